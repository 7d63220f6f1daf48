"""The bodies of requests: OpenAI's fields, checked strictly.

A field that this server honours is typed; one that makes no difference here is accepted and ignored; one that
would change the answer and cannot be honoured is refused unless it has its neutral value; any other is unknown.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from liaoyuan.errors import nearest
from liaoyuan.serving.errors import invalid, unsupported

MAX_CHOICES = 128  # `n`, and prompts in one request
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit

# Fields that ask for what changes nothing in the text: accepted, without effect.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "verbosity",
    "parallel_tool_calls",
    "stream_format",
}
# Fields that this server cannot honour, their neutral values, and what to say.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "it does not call tools."),
    "functions": (([],), "it does not call functions."),
    "tool_choice": (("none", "auto"), "it does not call tools."),
    "function_call": (("none", "auto"), "it does not call functions."),
    "response_format": (({"type": "text"},), "it cannot hold the answer to a format; ask for one in the prompt."),
    "modalities": ((["text"],), "it answers in text only."),
    "audio": ((), "it answers in text only."),
    "web_search_options": ((), "it never leaves this machine."),
    "logit_bias": (({},), "remove it."),
    "frequency_penalty": ((0,), "only 0 (no penalty)."),
    "presence_penalty": ((0,), "only 0 (no penalty)."),
    "repetition_penalty": ((1,), "only 1 (no penalty)."),
    "suffix": (("",), "it only continues text."),
    "best_of": ((1,), "ask for several answers with 'n'."),
}


def _unicode(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can spell but no text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "it is no valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Bounded = Annotated[int, Field(ge=1)]
Tokens = list[Annotated[int, Field(ge=0)]]


class Body(BaseModel):
    """Base of all bodies: strict types (a number in quotes is a mistake) and no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class StreamOptions(Body):
    """What else a stream carries: usage in a last chunk, and (as vLLM has it) running usage in every chunk too."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """What chat and plain completions have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        """Drop fields without effect, refuse those that cannot be honoured and those that nobody knows."""
        if not isinstance(values, dict):
            return values
        for name in values.keys() - cls.model_fields.keys() - IGNORED:
            _refuse(name, values[name], [*cls.model_fields, *IGNORED, *NEUTRAL])
        return {name: value for name, value in values.items() if name in cls.model_fields}

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings. Raises ApiError if there are too many or one is empty."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise invalid(f"At most {MAX_STOPS} stop strings are allowed.", "stop")
        if "" in stops:
            raise invalid("A stop string must not be empty.", "stop")
        return stops

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise invalid("'stream_options' is only allowed with 'stream'.", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def running_usage(self) -> bool:
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)


class Part(Body):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn of the conversation. Fields of other servers' replies are tolerated, so that a reply can be sent back."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class TemplateOptions(Body):
    """Arguments of the chat template that a request may set."""

    enable_thinking: bool | None = None


class ChatRequest(Sampling):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Bounded | None = None
    max_tokens: Bounded | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def thinking(self) -> bool:
        """Whether the model is to think before it answers."""
        if self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.reasoning_effort != "none"


class CompletionRequest(Sampling):
    """Body of `/v1/completions`."""

    prompt: Text | Tokens | Annotated[list[Text] | list[Tokens], Field(max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None


class RenderRequest(Body):
    """Body of `/page/render`."""

    text: Annotated[Text, Field(max_length=200_000)]


def _refuse(name: str, value: Any, known: list[str]) -> None:
    if name not in NEUTRAL:
        raise invalid(f"Unknown field '{name}'{nearest(name, known) or '.'}", name, "unknown_parameter")
    neutral, remedy = NEUTRAL[name]
    # `True == 1` in Python, but true is no number in JSON.
    if value is not None and (isinstance(value, bool) or value not in neutral):
        raise unsupported(name, remedy)
