"""From a conversation and its options to jobs of the engine: the one way of every endpoint that answers messages.

An endpoint of another shape (Anthropic's messages, OpenAI's responses) says what it is asked as a `ChatRequest`,
runs `chat_jobs` with `generation.start`, and gives the pieces its own shape; `tools.whole_calls` puts calls together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.inference import AfterThinking, Constraint, Grammar
from liaoyuan.serving.call_grammar import calls_grammar
from liaoyuan.serving.call_reader import CallReader
from liaoyuan.serving.chat_body import ChatRequest, EarlierCall, Function, Message, SomeTools
from liaoyuan.serving.errors import invalid, unsupported
from liaoyuan.serving.generation import Job, Served
from liaoyuan.serving.sampling import sampling_params
from liaoyuan.serving.structure import asked_grammar, asked_schema
from liaoyuan.serving.tools import CallFormat


def chat_jobs(served: Served, body: ChatRequest) -> list[Job]:
    """Return a job for each choice (`n`) of a request; call it in a thread, as prompts and grammars take a while.

    Raises:
        ApiError: the template refuses the messages, the prompt is too long, or a schema cannot be held.
    """
    calling = _calling(served, body)
    prompt = _prompt(served, body, calling)
    top_logprobs = body.top_logprobs or 0
    if top_logprobs and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    if body.logprob_token_ids and not body.logprobs:
        raise invalid("'logprob_token_ids' needs 'logprobs' to be true.", "logprob_token_ids")
    most = body.max_completion_tokens or body.max_tokens
    constraint = _constraint(served, body, calling)
    stops, shown = body.stops(), calling.shown(served) if calling else frozenset[int]()
    return [
        Job(
            prompt,
            sampling_params(served, body, prompt, most, top_logprobs, choice, constraint),
            stops,
            served.marks,
            calling.reader if calling else None,
            shown,
            body.priority or 0,
            body.cache_salt or "",
            bool(body.continue_final_message),
            bool(body.stream and body.return_progress),
        )
        for choice in range(body.n or 1)
    ]


def prefilled(served: Served, body: ChatRequest) -> ChatRequest:
    """Return a request that says that its answer goes on from a last message of the assistant, where that is so.

    Raises:
        ApiError: two messages of the assistant are the last.
    """
    *earlier, last = body.messages
    wanted = served.settings.continue_final_message and not body.add_generation_prompt
    if not wanted or last.role != "assistant" or last.tool_calls:
        return body
    if earlier and earlier[-1].role == "assistant":
        raise invalid("An answer can go on from one message of the assistant, not from two.", "messages")
    return body.model_copy(update={"continue_final_message": bool(earlier)})


@dataclass(frozen=True)
class _Calling:
    """What may be called, and how. must: at least one call is made. most: of calls; None: any number."""

    form: CallFormat
    functions: tuple[Function, ...]
    must: bool
    most: int | None

    @property
    def reader(self) -> Callable[[], CallReader]:
        tools = {function.name: function.parameters or {} for function in self.functions}
        return lambda: CallReader(self.form, tools, self.most)

    def shown(self, served: Served) -> frozenset[int]:
        """Return the special tokens of which the marks of calls are made."""
        form = self.form
        marks = form.open + form.start + form.separator + form.end + form.close
        special = ((index, served.tokenizer.token_bytes(index).decode()) for index in served.tokenizer.special_ids)
        return frozenset(index for index, text in special if text and text in marks)


def _calling(served: Served, body: ChatRequest) -> _Calling | None:
    """Return what a request lets the model call; None: nothing."""
    functions, (choice, names) = body.offered, body.choice
    if not functions and (choice == "required" or names):
        raise invalid("'tool_choice' wants a call, but there are no 'tools'.", "tool_choice")
    if not functions or choice == "none":
        return None
    if not served.tokenizer.takes_tools or served.call_format is None:
        why = "writes calls in no form that is known; name one with --call-format."
        why = why if served.tokenizer.takes_tools else "says nothing of tools."
        raise unsupported("tools", f"the chat template of this model {why}")
    if len({function.name for function in functions}) < len(functions):
        raise invalid("Two tools have the same name.", "tools")
    most = 1 if body.parallel_tool_calls is False or (body.functions and not body.tools) else None
    if names is not None:
        functions = [_named(functions, name) for name in names]
        most = 1 if len(names) == 1 and not isinstance(body.tool_choice, SomeTools) else most
    if not functions:
        return None
    return _Calling(served.call_format, tuple(functions), choice != "auto", most)


def _named(functions: list[Function], name: str) -> Function:
    found = next((function for function in functions if function.name == name), None)
    if found is None:
        hint = nearest(name, [function.name for function in functions]) or "."
        raise invalid(f"'tool_choice' names the tool '{name}', which is not among 'tools'{hint}", "tool_choice")
    return found


def _constraint(served: Served, body: ChatRequest, calling: _Calling | None) -> Constraint | None:
    """Return what holds the answer: its form, its calls, and the budget of the thought before it."""
    asked = asked_grammar(body)
    inner = served.hold(*asked) if asked and not calling else None
    if calling:
        schema = asked_schema(body)
        if asked and schema is None:
            raise invalid("With 'tools', the form of an answer can only be asked for as 'response_format'.", "tools")
        if calling.must or schema is not None or any(function.strict for function in calling.functions):
            inner = served.hold("tools", _calls_grammar(served, calling, schema))
    if served.marks is None or (inner is None and body.thinking_token_budget is None):
        return inner
    vocabulary, may_open = served.grammars.vocabulary, body.thinking(served.thinking)
    return AfterThinking(inner, served.marks, vocabulary, body.thinking_token_budget, may_open)


def _calls_grammar(served: Served, calling: _Calling, schema: dict[str, Any] | None) -> Grammar:
    free = not calling.must and schema is None
    answer = None if calling.must else schema
    return calls_grammar(
        calling.form, calling.functions, served.grammars.vocabulary, calling.most, text=free, answer=answer
    )


def chat_prompt(served: Served, body: ChatRequest, generation_prompt: bool = True) -> tuple[int, ...]:
    """Return the ids of a conversation and its tools. Raises ApiError if the template refuses them."""
    return _prompt(served, body, _calling(served, body), generation_prompt)


def chat_text(served: Served, body: ChatRequest, generation_prompt: bool = True) -> str:
    """Return the text that the chat template makes of a conversation and its tools. Raises ApiError if it refuses."""
    try:
        messages = [_message(message) for message in body.messages]
        thinking = body.thinking(served.thinking)
        return served.tokenizer.render_text(messages, thinking, generation_prompt, _described(body) or None)
    except LiaoyuanError as error:
        raise invalid(str(error), "messages") from error


def _described(body: ChatRequest) -> list[dict[str, Any]]:
    """Return the tools as templates know them."""
    described = (function.model_dump(exclude_none=True, exclude={"strict"}) for function in body.offered)
    return [{"type": "function", "function": function} for function in described]


def _prompt(served: Served, body: ChatRequest, calling: _Calling | None, more: bool = True) -> tuple[int, ...]:
    if body.kv_transfer_params and (ids := body.kv_transfer_params.prompt_token_ids):
        served.check_tokens(ids, "kv_transfer_params")
        return tuple(ids)
    tools = _described(body) if calling else None
    given = body.messages[:-1] if body.continue_final_message else body.messages
    more = bool(body.continue_final_message) or (more and body.add_generation_prompt is not False)
    try:
        messages = [_message(message) for message in given]
        thinking = body.thinking(served.thinking)
        begun = body.messages[-1].text() if body.continue_final_message else ""
        return tuple(served.tokenizer.render(messages, thinking, generation_prompt=more, tools=tools, begun=begun))
    except LiaoyuanError as error:
        raise invalid(str(error), "messages") from error


def _message(message: Message) -> dict[str, Any]:
    """Return a message as chat templates know it; "developer", and calls of "functions", have other names there."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    rendered: dict[str, Any] = {"role": role, "content": message.text()}
    thought = message.reasoning_content or message.reasoning
    if thought:
        rendered["reasoning_content"] = thought
    calls = message.tool_calls or ([EarlierCall(function=message.function_call)] if message.function_call else [])
    if calls:
        rendered["tool_calls"] = [call.model_dump(exclude_none=True) for call in calls]
    rendered |= {name: value for name in ("tool_call_id", "name") if (value := getattr(message, name))}
    return rendered
