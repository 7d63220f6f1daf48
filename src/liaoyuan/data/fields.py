"""A row of foreign data on its way to a record: its fields are taken one by one, and what nobody took is known.

What does not fit raises `RowError`, which says what was expected and what was found there.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic_core

from liaoyuan.data.records import Message, Record, Role, ToolCall, plain_chat, plain_message

CALL = "function_call"  # the role of a turn that is nothing but a call
ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai", CALL), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "function_response", "tool_response"), "tool"),
}
BARE_ROLES = {told: role for told, role in ROLES.items() if told != CALL}
THOUGHTS = ("think", "reasoning_content", "reasoning", "thinking")
NAMES, LEVELS, LICENCES = ("id", "qid", "uuid", "idx"), ("level", "difficulty"), ("licence", "license")
HISTORY = {*NAMES, *LEVELS, *LICENCES, "source", "split"}  # fields that tell where a record comes from
SHOWN = 60  # characters of a wrong value that a message shows
OPEN, CLOSE = "<think>", "</think>"


class RowError(Exception):
    """Why a row becomes no record: `expected`, the same for all rows with this flaw, and what was `found` in this."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


class Fields:
    """The fields of one row; `unused` are those that nothing was made of."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self._used: set[str] = set()

    def has(self, *names: str) -> bool:
        """Return whether all these fields are there and not null."""
        return all(self.row.get(name) is not None for name in names)

    def take(self, *names: str) -> Any:
        """Return the value of the first of these fields that is there and not null; None if none is."""
        self._used.update(names)
        for name in names:
            value = self.row.get(name)
            if value is not None:
                return value
        return None

    def text(self, *names: str) -> str:
        """Return a field as text; a number or a truth value is written out, null and what is missing is empty."""
        value = self.take(*names)
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str | int | float):
            return str(value)
        raise RowError(f"text in '{names[0]}'", shown(value))

    @property
    def unused(self) -> list[str]:
        return [name for name, value in self.row.items() if name not in self._used and value not in (None, "", [], {})]

    def record(self, place: str, **values: Any) -> Record:
        """Return the record of these values, with the history that the row tells; `place` is its id if it has none."""
        return Record(**({"id": place} | self._history() | values))

    def chat(self, place: str, messages: Sequence[Message]) -> Record:
        """Return `record(place, messages=messages)`, the short way where the row tells no history."""
        if self.row.keys().isdisjoint(HISTORY):
            return plain_chat(place, tuple(messages))
        return self.record(place, messages=tuple(messages))

    def _history(self) -> dict[str, Any]:
        level = "".join(character for character in self.text(*LEVELS) if character.isdigit())
        told = {
            "id": self.text(*NAMES),
            "level": int(level[:9] or 0),
            "source": self.text("source"),
            "licence": self.text(*LICENCES),
            "split": self.text("split"),
        }
        return {name: value for name, value in told.items() if value}


def shown(value: Any) -> str:
    """Return a wrong value as a message shows it: JSON, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"'{text}'" if len(text) <= SHOWN else f"'{text[:SHOWN]}...'"


def turns(value: Any, name: str) -> list[Message]:
    """Return the messages of a list of turns, OpenAI's (role, content) or ShareGPT's (from, value).

    A turn that only calls functions is joined to the assistant's turn before it.
    """
    if not isinstance(value, list) or not value:
        raise RowError(f"a list of turns in '{name}'", shown(value))
    found: list[Message] = []
    for item in value:
        message = _bare_turn(item) or turn(item, name)
        if message.tool_calls and found and not message.content and not message.think and _is_open(found[-1]):
            found[-1] = found[-1].model_copy(update={"tool_calls": message.tool_calls})
        else:
            found.append(message)
    return found


def _bare_turn(item: Any) -> Message | None:
    """Return the message of a turn that has a role and a text and nothing else, as most have; None for any other."""
    if type(item) is not dict or len(item) != 2:
        return None
    told, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    role = BARE_ROLES.get(told) if type(told) is str else None
    if role is None or type(content) is not str or CLOSE in content:
        return None
    return plain_message(role, content)


def turn(item: Any, name: str) -> Message:
    """Return the message of one turn."""
    if not isinstance(item, dict):
        raise RowError(f"turns with a role and content in '{name}'", shown(item))
    told = item.get("role", item.get("from"))
    called = told.lower() if isinstance(told, str) else ""
    role = ROLES.get(called)
    if role is None:
        raise RowError(f"a role of user, assistant, system or tool in '{name}'", shown(told))
    content = text_of(item.get("content", item.get("value")), name)
    if role != "assistant":
        call = {key: item[key] for key in ("tool_call_id", "name") if isinstance(item.get(key), str)}
        return Message(role=role, content=content, weight=1.0, **call)
    calls = item.get("tool_calls") or item.get("function_call") or ()
    if called == CALL:
        calls, content = parsed(content, "the JSON of a call in 'function_call'"), ""
    think = next((item[key] for key in THOUGHTS if isinstance(item.get(key), str) and item[key]), "")
    if not think:
        think, content = split_thought(content)
    return Message(role=role, content=content, think=think, weight=_weight(item), tool_calls=_calls(calls))


def answer(value: Any, name: str) -> tuple[Message, ...]:
    """Return the assistant's messages of an answer: text, one turn, or a list of them."""
    if isinstance(value, list):
        return tuple(turns(value, name))
    if isinstance(value, dict):
        return (turn(value, name),)
    think, content = split_thought(text_of(value, name))
    return (Message(role="assistant", content=content, think=think) if think else plain_message("assistant", content),)


def user(content: str) -> Message:
    return plain_message("user", content)


def text_of(content: Any, name: str) -> str:
    """Return the text of a content, which may be a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"text in '{name}'", shown(part))
    return "".join(part["text"] for part in parts)


def split_thought(content: str) -> tuple[str, str]:
    """Return the thought and the answer of a text that begins with <think>; any other text is all answer."""
    head, mark, rest = content.partition(CLOSE)
    if not mark or not head.lstrip().startswith(OPEN):
        return "", content
    return head.lstrip().removeprefix(OPEN).strip("\n"), rest.lstrip("\n")


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Return tools as OpenAI's API describes them; JSON text and bare functions are taken too."""
    found = parsed(value, "the JSON of a list of tools in 'tools'") if isinstance(value, str) and value else value
    if not found:
        return ()
    tools = found if isinstance(found, list) else [found]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("a list of tools in 'tools'", shown(value))
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def parsed(text: str, expected: str) -> Any:
    """Return the value of a JSON text."""
    try:
        return pydantic_core.from_json(text)
    except ValueError:
        raise RowError(expected, shown(text)) from None


def _calls(value: Any) -> tuple[ToolCall, ...]:
    calls = []
    for item in value if isinstance(value, list | tuple) else [value]:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("calls with a name and arguments", shown(item))
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parsed(arguments, "the JSON of a call's arguments")
        if not isinstance(arguments, dict):
            raise RowError("a JSON object as a call's arguments", shown(arguments))
        calls.append(ToolCall(name=function["name"], arguments=arguments, id=str(item.get("id") or "")))
    return tuple(calls)


def _weight(item: Mapping[str, Any]) -> float:
    """Return a turn's loss weight; some layouts say it as a truth value named `train` or `loss`."""
    value = next((item[key] for key in ("weight", "train", "loss") if item.get(key) is not None), 1.0)
    if not isinstance(value, bool | int | float) or not 0 <= value < float("inf"):
        raise RowError("a weight of at least 0", shown(value))
    return float(value)


def _is_open(message: Message) -> bool:
    return message.role == "assistant" and not message.tool_calls
