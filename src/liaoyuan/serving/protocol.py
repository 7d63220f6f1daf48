"""The bodies of requests: OpenAI's fields, checked strictly.

A field that this server honours is typed; one that makes no difference here is accepted and ignored; one that
would change the answer and cannot be honoured is refused unless it has its neutral value; any other is unknown.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from liaoyuan.errors import nearest
from liaoyuan.serving.errors import invalid, unsupported

MAX_CHOICES = 128  # `n`, and prompts in one request
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
MAX_BAD_WORDS = 256
MAX_TOOLS = 256

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
    "stream_format",
    "guided_decoding_backend",
    # What llama.cpp's clients say of its slots and cache:
    "cache_prompt",
    "id_slot",
    "return_progress",
}
# Fields that this server cannot honour, their neutral values, and what to say.
Neutral = Mapping[str, tuple[tuple[Any, ...], str]]
NEUTRAL: Neutral = {
    "tools": (([],), "only /v1/chat/completions calls tools."),
    "functions": (([],), "only /v1/chat/completions calls functions."),
    "tool_choice": (("none", "auto"), "only /v1/chat/completions calls tools."),
    "function_call": (("none", "auto"), "only /v1/chat/completions calls functions."),
    "parallel_tool_calls": ((True, False), "only /v1/chat/completions calls tools."),
    "modalities": ((["text"],), "it answers in text only."),
    "audio": ((), "it answers in text only."),
    "web_search_options": ((), "it never leaves this machine."),
    "suffix": (("",), "it only continues text."),
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
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Schema = dict[str, Any] | bool
Choices = Annotated[list[Text], Field(min_length=1)]
Truncation = Annotated[int, Field(ge=-1)]  # keep so many tokens at the end of a prompt; -1: as many as fit


class Body(BaseModel):
    """Base of all bodies: strict types (a number in quotes is a mistake) and no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class StreamOptions(Body):
    """What else a stream carries: usage in a last chunk, and (as vLLM has it) running usage in every chunk too."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """A JSON schema with a name, as `response_format` has it; `strict` makes no difference: it is always held."""

    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be: any text, any JSON object, or JSON of a schema (`schema`: llama.cpp's place for it)."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(default=None, alias="schema")


class StructuredOutputs(Body):
    """vLLM's ways to hold an answer to a form; at most one of them."""

    json_: str | Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Asked(Body):
    """A request of this API: names a model; a field that nobody knows is refused with the nearest right name."""

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        return known_fields(values, cls.model_fields, IGNORED, NEUTRAL)


class Sampling(Asked):
    """What chat and plain completions have in common."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    bad_words: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_BAD_WORDS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: Schema | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    request_id: Annotated[Text, Field(min_length=1, max_length=128)] | None = None

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


TruncationSide = Literal["left", "right"]  # which end of a prompt that is too long goes away


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
    for times in every chunk of a stream, and for the prompt as the model reads it.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Bounded | None = None
    max_tokens: Bounded | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    return_token_ids: bool | None = None
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | SomeTools | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    kv_transfer_params: TransferParams | None = None
    timings_per_token: bool | None = None
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


class CompletionRequest(Sampling):
    """Body of `/v1/completions`."""

    prompt: Text | Tokens | Annotated[list[Text] | list[Tokens], Field(max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: TruncationSide | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def candidates(self) -> int:
        """How many answers are generated for each prompt, of which the best `choices` are given."""
        return max(self.best_of or 1, self.choices)

    @model_validator(mode="after")
    def _best_of_whole_answers(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.choices:
            raise invalid(f"'best_of' ({self.best_of}) must be at least 'n' ({self.choices}).", "best_of")
        if self.candidates > self.choices and self.stream:
            raise invalid("'best_of' cannot be streamed: the best is known at the end.", "best_of")
        return self


class TokenizeRequest(Asked):
    """Body of `/tokenize`: `prompt` or `messages` as vLLM has them, or `content` as llama.cpp has it.

    parse_special: whether a special token that stands in the text is that token (else it is plain characters, as the
    prompt of a completion is read).
    """

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    content: Text | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None

    @model_validator(mode="after")
    def _one_text(self) -> "TokenizeRequest":
        if sum(given is not None for given in (self.prompt, self.messages, self.content)) != 1:
            raise invalid("Give one of 'prompt', 'messages' and 'content'.", "prompt")
        return self


class DetokenizeRequest(Asked):
    """Body of `/detokenize`."""

    tokens: Tokens


class RenderRequest(Body):
    """Body of `/page/render`."""

    text: Annotated[Text, Field(max_length=200_000)]


def known_fields(values: Any, fields: Collection[str], ignored: Collection[str], neutral: Neutral) -> Any:
    """Drop fields without effect, refuse those that cannot be honoured and those that nobody knows."""
    if not isinstance(values, dict):
        return values
    for name in values.keys() - {*fields, *ignored}:
        if name not in neutral:
            hint = nearest(name, [*fields, *ignored, *neutral]) or "."
            raise invalid(f"Unknown field '{name}'{hint}", name, "unknown_parameter")
        allowed, remedy = neutral[name]
        # `True == 1` in Python, but true is no number in JSON.
        if values[name] is not None and (isinstance(values[name], bool) or values[name] not in allowed):
            raise unsupported(name, remedy)
    return {name: value for name, value in values.items() if name in fields}
