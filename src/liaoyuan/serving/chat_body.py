"""The body of `/v1/chat/completions`: messages, tools, and what else OpenAI, vLLM and llama.cpp let a chat ask."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from liaoyuan.serving.errors import invalid
from liaoyuan.serving.protocol import Body, Bounded, Sampling, Text, Tokens

MAX_TOOLS = 256


class Part(Body):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class CalledFunction(BaseModel):
    """Which function an earlier message called; `arguments` is the text of a JSON object."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    name: Text
    arguments: Text | None = None


class EarlierCall(BaseModel):
    """A tool call of an earlier message."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    id: Text | None = None
    function: CalledFunction


class Message(BaseModel):
    """A turn of the conversation. Fields of other servers' replies are tolerated, so that a reply can be sent back."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: list[EarlierCall] | None = None
    function_call: CalledFunction | None = None
    tool_call_id: Text | None = None
    name: Text | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Body):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call; only functions are understood."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class TemplateOptions(Body):
    """Arguments of the chat template that a request may set."""

    enable_thinking: bool | None = None


class AllowedTools(Body):
    """Which of the tools may be called now; the others stay in the prompt, so that its cache can be used."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class SomeTools(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TransferParams(Body):
    """What another server that has read the prompt hands over: its tokens."""

    prompt_token_ids: Annotated[Tokens, Field(min_length=1)] | None = None


class ChatRequest(Sampling):
    """Body of `/v1/chat/completions`.

    echo: an answer that goes on from the last message begins with it. kv_transfer_params: vLLM's place for the tokens
    of a prompt that are taken as they are, instead of those of the messages. timings_per_token, verbose: llama.cpp's,
    for times in every chunk of a stream, and for the prompt as the model reads it. return_progress: a stream tells how
    much of the prompt is read, while it is.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Bounded | None = None
    max_tokens: Bounded | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | SomeTools | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    echo: bool | None = None
    kv_transfer_params: TransferParams | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None
    verbose: bool | None = None

    @model_validator(mode="after")
    def _one_end(self) -> "ChatRequest":
        if self.echo and not self.continue_final_message:
            raise invalid("'echo' gives back what an answer goes on from: it needs 'continue_final_message'.", "echo")
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise invalid(
                "'continue_final_message' and 'add_generation_prompt' exclude each other.", "continue_final_message"
            )
        last = self.messages[-1]
        if len(self.messages) < 2 or last.role != "assistant" or last.tool_calls:
            message = "'continue_final_message' needs messages of which the last is the assistant's, without calls."
            raise invalid(message, "continue_final_message")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_at_once(self) -> "ChatRequest":
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("'prompt_logprobs' cannot be streamed.", "prompt_logprobs")
        return self

    @property
    def echoed(self) -> str:
        """The beginning of the answer that was given and is wanted back."""
        return self.messages[-1].text() if self.echo and self.continue_final_message else ""

    @property
    def offered(self) -> list[Function]:
        """The functions that the model may call, by the new name of this list or the old one."""
        return [tool.function for tool in self.tools or []] or self.functions or []

    @property
    def choice(self) -> tuple[str, list[str] | None]:
        """Whether the model is to call ("none", "auto", "required"), and the functions that it may; None: any."""
        chosen = self.tool_choice or self.function_call or "auto"
        if isinstance(chosen, SomeTools):
            return chosen.allowed_tools.mode, [tool.function.name for tool in chosen.allowed_tools.tools]
        if isinstance(chosen, str):
            return chosen, None
        return "required", [chosen.function.name if isinstance(chosen, NamedTool) else chosen.name]

    def thinking(self, usual: bool) -> bool:
        """Return whether the model is to think before it answers; usual: if the request does not say."""
        if self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        return usual if self.reasoning_effort is None else self.reasoning_effort != "none"
