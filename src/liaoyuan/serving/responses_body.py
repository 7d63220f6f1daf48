"""The body of OpenAI's `/v1/responses`, and what it is as a chat request."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from liaoyuan.serving.chat_body import ChatRequest
from liaoyuan.serving.errors import ApiError, invalid, unsupported
from liaoyuan.serving.messages_body import Tolerant
from liaoyuan.serving.protocol import MAX_TOP_LOGPROBS, Body, Bounded, Neutral, Text, known_fields
from liaoyuan.serving.turns import add_turn, chat_request, tool_call

IGNORED = {
    "max_tool_calls",  # of tools that a server runs
    "moderation",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "stream_options",
    "user",
}
NEUTRAL: Neutral = {
    "background": ((False,), "ask for a stream instead."),
    "context_management": (([],), "give the turns that matter."),
    "conversation": ((), "give the earlier turns in 'input', or 'previous_response_id'."),
    "prompt": ((), "it keeps no prompts."),
    "truncation": (("disabled",), "only 'disabled': give fewer turns."),
}
SAME = (  # in chat
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "parallel_tool_calls",
)
WITH_LOGPROBS = "message.output_text.logprobs"


class TextPart(Tolerant):
    type: Literal["input_text", "output_text", "text"]
    text: Text


class RefusalPart(Tolerant):
    type: Literal["refusal"]
    refusal: Text


def _parts(content: Any) -> Any:
    """Return content as a list of parts; a text alone is one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
Parts = Annotated[list[Part], BeforeValidator(_parts)]


class MessageItem(Tolerant):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts


class CallItem(Tolerant):
    """A call of a function; arguments: JSON."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class CallOutputItem(Tolerant):
    """What a function gave back."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Parts


class ReasoningText(Tolerant):
    text: Text


class ReasoningItem(Tolerant):
    """A thought of an earlier answer."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[ReasoningText] | None = None


def _typed(item: Any) -> Any:
    """Return an item with its type, which a message may leave out."""
    return {"type": "message", **item} if isinstance(item, dict) and item.get("type") is None else item


Item = Annotated[
    Annotated[MessageItem | CallItem | CallOutputItem | ReasoningItem, Field(discriminator="type")],
    BeforeValidator(_typed),
]


def _items(given: Any) -> Any:
    """Return input as a list of items; a text alone is what the user says."""
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


class FunctionTool(Tolerant):
    """A function that the client runs."""

    type: Literal["function"]
    name: Annotated[Text, Field(min_length=1)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Tolerant):
    type: Literal["function"]
    name: Text


class AllowedTools(Tolerant):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


class TextFormat(Body):
    """The form of the answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Tolerant):
    format: TextFormat | None = None


class Reasoning(Tolerant):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(Body):
    """Body of `/v1/responses`. timings_per_token, return_progress: llama.cpp's, as in chat."""

    input: Annotated[list[Item], BeforeValidator(_items), Field(min_length=1)]
    model: str | None = None
    instructions: Text | None = None
    previous_response_id: str | None = None
    max_output_tokens: Bounded | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for tool in values.get("tools") or []:
                if isinstance(tool, dict) and tool.get("type") not in ("function", None):
                    raise unsupported("tools", f"it runs no '{tool['type']}'; only functions that the client runs.")
        return known_fields(values, cls.model_fields, IGNORED, NEUTRAL)

    @property
    def logprobs(self) -> bool:
        """Whether the log-probabilities of the text's tokens are wanted."""
        return WITH_LOGPROBS in (self.include or ())

    @property
    def effort(self) -> str | None:
        """How much the model is to think, in chat's words."""
        effort = self.reasoning.effort if self.reasoning else None
        return "xhigh" if effort == "max" else effort

    def turns(self) -> list[dict[str, Any]]:
        """Return the input as chat messages."""
        messages: list[dict[str, Any]] = []
        for item in self.input:
            add_turn(messages, _turn(item), ("assistant",))
        return messages

    def chat(self, earlier: list[dict[str, Any]]) -> ChatRequest:
        """Return the chat request that asks for the same, after the messages of `earlier` turns.

        Raises:
            ApiError: it asks for what chat refuses.
        """
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        tools, choice = self._chat_tools()
        fields = {
            "messages": [*system, *earlier, *self.turns()],
            "max_completion_tokens": self.max_output_tokens,
            "tools": tools or None,
            "tool_choice": choice,
            "response_format": _chat_format(self.text.format if self.text else None),
            "reasoning_effort": self.effort,
            "logprobs": True if self.logprobs else None,
            "top_logprobs": self.top_logprobs if self.logprobs else None,
            **{name: getattr(self, name) for name in SAME},
        }
        return chat_request({name: value for name, value in fields.items() if value is not None})

    def _chat_tools(self) -> tuple[list[dict[str, Any]], Any]:
        """Return the tools that may be called, and the choice among them."""
        tools, choice = self.tools or [], self.tool_choice
        if isinstance(choice, AllowedTools):
            allowed = {tool.name for tool in choice.tools}
            unknown = allowed - {tool.name for tool in tools}
            if unknown:
                raise _no_such_tool(min(unknown))
            return [_chat_tool(tool) for tool in tools if tool.name in allowed], choice.mode
        if isinstance(choice, NamedFunction):
            if choice.name not in {tool.name for tool in tools}:
                raise _no_such_tool(choice.name)
            return [_chat_tool(tool) for tool in tools], {"type": "function", "function": {"name": choice.name}}
        return [_chat_tool(tool) for tool in tools], choice


def _no_such_tool(name: str) -> ApiError:
    return invalid(f"'tool_choice' names '{name}', which is none of the tools.", "tool_choice")


def _turn(item: Any) -> dict[str, Any]:
    """Return an item as a chat message; pieces of one answer are joined later."""
    match item:
        case MessageItem():
            return {"role": item.role, "content": _text(item.content)}
        case CallItem():
            call = tool_call(item.call_id, item.name, item.arguments)
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case CallOutputItem():
            return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
        case _:
            thought = "".join(part.text for part in item.content or item.summary or [])
            return {"role": "assistant", "content": "", **({"reasoning_content": thought} if thought else {})}


def _text(parts: list[Any]) -> str:
    return "".join(part.text if part.type != "refusal" else part.refusal for part in parts)


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _chat_format(format: TextFormat | None) -> dict[str, Any] | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return {"type": "json_object"}
    schema = {"name": format.name or "answer", "schema": format.schema_, "strict": format.strict}
    return {"type": "json_schema", "json_schema": {name: value for name, value in schema.items() if value is not None}}
