"""The bodies of Anthropic's `/v1/messages` and `/v1/messages/count_tokens`, and what they are as a chat request."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from liaoyuan.serving.chat_body import ChatRequest
from liaoyuan.serving.errors import invalid
from liaoyuan.serving.protocol import Body, Bounded, Neutral, Text, known_fields
from liaoyuan.serving.turns import add_turn, chat_request, tool_call

IGNORED = {
    "cache_control",
    "context_management",
    "diagnostics",
    "inference_geo",
    "metadata",
    "service_tier",
    "speed",
    "thread",
    "user_profile_id",
    "workspace_id",
}
NEUTRAL: Neutral = {
    "container": ((), "it runs no code of its own."),
    "mcp_servers": (([],), "it never leaves this machine."),
}


class Tolerant(BaseModel):
    """Base of what a client sends back from replies, of this server or of others: more fields do no harm."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextBlock(Tolerant):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Tolerant):
    type: Literal["thinking"]
    thinking: Text


class RedactedThinkingBlock(Tolerant):
    """A thought that another server keeps secret; there is nothing in it to read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Tolerant):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]


def _blocks(content: Any) -> Any:
    """Return content as a list of blocks; a text alone is one block."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Texts = Annotated[list[TextBlock], BeforeValidator(_blocks)]


class ToolResultBlock(Tolerant):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: Texts | None = None
    is_error: bool | None = None

    def text(self) -> str:
        """Return the result as the model reads it; chat templates have no other place to say that a tool failed."""
        text = _text(self.content or [])
        return f"Error: {text or 'the tool failed.'}" if self.is_error else text


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class AnthropicMessage(Tolerant):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks)]


class AnthropicTool(Tolerant):
    """A tool that the client runs."""

    name: Annotated[Text, Field(min_length=1, max_length=128)]
    input_schema: dict[str, Any]
    description: Text | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None


class ToolChoice(Body):
    """Whether and which tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise invalid("In 'tool_choice', 'name' belongs to the type 'tool', which needs it.", "tool_choice")
        return self


class Thinking(Body):
    """Whether the model thinks before it answers, and for how many tokens at most."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Bounded | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class CountTokensRequest(Body):
    """Body of `/v1/messages/count_tokens`."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    model: str | None = None
    system: Texts | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # its older place

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("thread"):
            # By this code clients know that they must send the whole conversation.
            raise invalid("It keeps no threads: send all messages.", "thread", "thread_unsupported_request")
        return known_fields(values, cls.model_fields, IGNORED, NEUTRAL)

    @property
    def begun(self) -> bool:
        """Whether the last turn is the beginning of the answer."""
        last = self.messages[-1]
        return last.role == "assistant" and all(block.type == "text" for block in last.content)

    def chat(self) -> ChatRequest:
        """Return the chat request that asks for the same.

        Raises:
            ApiError: it asks for what chat refuses.
        """
        return chat_request({name: value for name, value in self._fields() if value is not None})

    def _fields(self) -> list[tuple[str, Any]]:
        thinks = self.thinking is not None and self.thinking.type != "disabled"
        choice = self.tool_choice
        output = self.output_config or OutputConfig()
        return [
            ("messages", self._messages()),
            ("tools", [_chat_tool(tool) for tool in self.tools] if self.tools else None),
            ("tool_choice", _chat_choice(choice) if choice else None),
            ("parallel_tool_calls", False if choice and choice.disable_parallel_tool_use else None),
            ("response_format", _chat_format(output.format or self.output_format)),
            ("continue_final_message", True if self.begun else None),
            ("chat_template_kwargs", {"enable_thinking": thinks}),
            ("thinking_token_budget", self.thinking.budget_tokens if thinks and self.thinking else None),
            ("reasoning_effort", "xhigh" if output.effort == "max" else output.effort),
        ]

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system)})
        for message in self.messages:
            for turn in _turns(message):
                add_turn(messages, turn, ("user", "assistant"))
        return messages


class MessagesRequest(CountTokensRequest):
    """Body of `/v1/messages`."""

    max_tokens: Bounded
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: list[Text] | None = None
    stream: bool | None = None

    def _fields(self) -> list[tuple[str, Any]]:
        names = ("temperature", "top_p", "top_k")
        return [*super()._fields(), *((name, getattr(self, name)) for name in names), ("stop", self.stop_sequences)]


def _text(blocks: list[Any]) -> str:
    return "".join(block.text for block in blocks if block.type == "text")


def _turns(message: AnthropicMessage) -> list[dict[str, Any]]:
    """Return the chat messages of a turn: results of tools are turns of their own there."""
    if message.role == "assistant":
        return [_assistant_turn(message)]
    turns: list[dict[str, Any]] = []
    for block in message.content:
        if block.type == "tool_result":
            turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text()})
        elif block.type == "text" and turns and turns[-1]["role"] == message.role:
            turns[-1]["content"] += block.text
        elif block.type == "text":
            turns.append({"role": message.role, "content": block.text})
    return turns


def _assistant_turn(message: AnthropicMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": _text(message.content)}
    thought = "".join(block.thinking for block in message.content if block.type == "thinking")
    if thought:
        turn["reasoning_content"] = thought
    calls = [
        tool_call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
        for block in message.content
        if block.type == "tool_use"
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def _chat_tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _chat_choice(choice: ToolChoice) -> Any:
    named = {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]


def _chat_format(format: JsonFormat | None) -> dict[str, Any] | None:
    if format is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format.schema_, "strict": True}}
