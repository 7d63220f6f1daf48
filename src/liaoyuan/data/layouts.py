"""Layouts of conversations, preferences and texts, each known by its fields, and how a row of each becomes records.

Alpaca, ShareGPT, OpenAI's messages, prompt and completion, chosen and rejected (strings, lists, with or without a
prompt), answers with a label (KTO), plain text. Sets of problems are in `problem_layouts`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from liaoyuan.data.fields import Fields, RowError, answer, shown, split_thought, text_of, tools_of, turns, user
from liaoyuan.data.records import Message, Record

LABELS = ("label", "kto_tag")
PROMPTS = ("prompt", "question", "query", "instruction")
COMPLETIONS = ("completion", "response", "output", "answer")
TOOLS, SYSTEMS = ("tools", "functions"), ("system", "system_prompt")
BESIDE_TURNS = {*LABELS, *TOOLS, *SYSTEMS, "task", "answer"}  # fields that change what a list of turns becomes
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")  # how a conversation is written as one text


@dataclass(frozen=True)
class Layout:
    """`fields` that a row of this layout has at least; `convert(fields, place)` gives its records."""

    name: str
    fields: tuple[str, ...]
    convert: Callable[[Fields, str], list[Record]]


def _messages(fields: Fields, place: str) -> list[Record]:
    return [_conversation(fields, place, "messages")]


def _sharegpt(fields: Fields, place: str) -> list[Record]:
    return [_conversation(fields, place, "conversations")]


def _conversation(fields: Fields, place: str, name: str) -> Record:
    messages = turns(fields.take(name), name)
    if fields.row.keys().isdisjoint(BESIDE_TURNS):
        return fields.chat(place, messages)
    messages = _with_system(fields, messages)
    tools = tools_of(fields.take(*TOOLS))
    values = {"tools": tools, "task": fields.text("task"), "answer": fields.text("answer")}
    label = _label(fields)
    if label is not None:
        return fields.record(place, kind="unpaired", messages=tuple(messages), label=label, **values)
    if not any(message.role == "assistant" for message in messages) and values["answer"]:
        return fields.record(place, kind="prompt", messages=tuple(messages), **values)
    return fields.record(place, messages=tuple(messages), **values)


def _alpaca(fields: Fields, place: str) -> list[Record]:
    messages = _asked(fields)
    kind, label = "chat", _label(fields)
    if label is not None:
        kind = "unpaired"
    messages += answer(fields.take("output"), "output")
    return [fields.record(place, kind=kind, messages=tuple(messages), label=label)]


def _self_instruct(fields: Fields, place: str) -> list[Record]:
    instruction, instances = fields.text("instruction"), fields.take("instances")
    if not isinstance(instances, list) or not instances:
        raise RowError("a list of inputs and outputs in 'instances'", shown(instances))
    whole = fields.record(place)
    records = []
    for number, instance in enumerate(instances):
        part = Fields(instance if isinstance(instance, dict) else {})
        messages = (user(_joined(instruction, part.text("input"))), *answer(part.take("output"), "output"))
        name = whole.id if len(instances) == 1 else f"{whole.id}/{number}"
        records.append(whole.model_copy(update={"id": name, "messages": messages}))
    return records


def _completion(fields: Fields, place: str) -> list[Record]:
    prompt = _prompt(fields)
    messages = (*prompt, *answer(fields.take(*COMPLETIONS), "completion"))
    label = _label(fields)
    tools = tools_of(fields.take("tools"))
    if label is not None:
        return [fields.record(place, kind="unpaired", messages=messages, label=label, tools=tools)]
    return [fields.record(place, messages=messages, tools=tools)]


def _preference(fields: Fields, place: str) -> list[Record]:
    """A prompt in any form, or none: then it is what both conversations begin with."""
    chosen, rejected = (_side(fields.take(name), name) for name in ("chosen", "rejected"))
    prompt: list[Message] = []
    if fields.has("messages") or fields.has("conversations"):
        name = "messages" if fields.has("messages") else "conversations"
        prompt = _with_system(fields, turns(fields.take(name), name))
    elif any(fields.has(name) for name in PROMPTS):
        prompt = _asked(fields) if fields.has("instruction") else _prompt(fields)
    common = _common(chosen, rejected)
    if not prompt or chosen[: len(prompt)] == tuple(prompt):  # the sides are whole conversations
        prompt, chosen, rejected = [*chosen[:common]], chosen[common:], rejected[common:]
    elif chosen[0].role != "assistant":
        chosen, rejected = chosen[common:], rejected[common:]
    tools = tools_of(fields.take("tools"))
    return [
        fields.record(place, kind="preference", messages=tuple(prompt), chosen=chosen, rejected=rejected, tools=tools)
    ]


def _text(fields: Fields, place: str) -> list[Record]:
    return [fields.record(place, kind="text", messages=(user(fields.text("text")),))]


def _prompt(fields: Fields) -> list[Message]:
    """Return the messages of a prompt: a text, or a list of turns."""
    value = fields.take(*PROMPTS)
    messages = turns(value, "prompt") if isinstance(value, list) else _transcript(text_of(value, "prompt"), "user")
    return _with_system(fields, messages)


def _asked(fields: Fields) -> list[Message]:
    """Return what Alpaca asks: system, history (pairs of question and answer), instruction and input."""
    messages: list[Message] = []
    for pair in fields.take("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("pairs of a question and an answer in 'history'", shown(pair))
        messages += [user(text_of(pair[0], "history")), *answer(pair[1], "history")]
    messages.append(user(_joined(fields.text("instruction"), fields.text("input"))))
    return _with_system(fields, messages)


def _with_system(fields: Fields, messages: Sequence[Message]) -> list[Message]:
    system = fields.text(*SYSTEMS)
    return [*([Message(role="system", content=system)] if system.strip() else []), *messages]


def _side(value: Any, name: str) -> tuple[Message, ...]:
    """Return the messages of one side of a preference; a text may be a whole transcript."""
    if isinstance(value, str):
        return tuple(_transcript(value, "assistant"))
    return answer(value, name)


def _transcript(text: str, role: Any) -> list[Message]:
    """Return the turns of a text, which is one turn of `role` unless it begins as a transcript does."""
    parts = TRANSCRIPT.split(text)
    if len(parts) == 1 or parts[0].strip():
        think, content = split_thought(text) if role == "assistant" else ("", text)
        return [Message(role=role, content=content, think=think)]
    roles = ["user" if told == "Human" else "assistant" for told in parts[1::2]]
    return [
        Message(role=told, content=content.strip())
        for told, content in zip(roles, parts[2::2], strict=True)
        if content.strip()
    ]


def _common(left: Sequence[Message], right: Sequence[Message]) -> int:
    """Return with how many messages both begin."""
    return next((place for place, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), 0)


def _label(fields: Fields) -> bool | None:
    value = fields.take(*LABELS)
    if value is None or isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    raise RowError("true or false in 'label'", shown(value))


def _joined(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given.strip() and instruction.strip() else instruction or given


PREFERENCES = (Layout("preference", ("chosen", "rejected"), _preference),)
CONVERSATIONS = (
    Layout("messages", ("messages",), _messages),
    Layout("ShareGPT", ("conversations",), _sharegpt),
)
LABELLED = tuple(
    Layout(f"question, answer and {label}", ("question", "answer", label), _completion) for label in LABELS
)
INSTRUCTIONS = (
    Layout("Self-Instruct", ("instruction", "instances"), _self_instruct),
    Layout("Alpaca", ("instruction", "output"), _alpaca),
    *(
        Layout(f"{prompt} and {completion}", (prompt, completion), _completion)
        for prompt in PROMPTS
        for completion in COMPLETIONS
        if (prompt, completion) != ("question", "answer")  # a problem, unless the answer has a label
    ),
    Layout("text", ("text",), _text),
)
