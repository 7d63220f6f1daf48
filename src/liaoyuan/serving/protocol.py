"""What the bodies of requests have in common: OpenAI's fields, checked strictly.

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
MAX_SCORED = 1000  # of `logprob_token_ids`

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
}
OTHER_NAMES = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
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
    """What chat and plain completions have in common. Two fields have llama.cpp's names too.

    logprob_token_ids: tokens whose log-probabilities are told in place of those of the most probable ones (vLLM's).
    """

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    bad_words: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[Tokens, Field(min_length=1)] | None = None
    logprob_token_ids: Annotated[Tokens, Field(min_length=1, max_length=MAX_SCORED)] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        return known_fields(renamed(values), cls.model_fields, IGNORED, NEUTRAL)

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


def renamed(values: Any) -> Any:
    """Give fields of llama.cpp the names that they have here."""
    if not isinstance(values, dict):
        return values
    for other, name in OTHER_NAMES.items():
        if other in values and name in values:
            raise invalid(f"'{name}' and '{other}' are two names of one thing; give one.", other)
    return {OTHER_NAMES.get(name, name): value for name, value in values.items()}


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
        neutral_value = any(type(one) is type(values[name]) and one == values[name] for one in allowed)
        if values[name] is not None and not neutral_value:
            raise unsupported(name, remedy)
    return {name: value for name, value in values.items() if name in fields}
