"""The bodies of `/v1/embeddings`, `/rerank` and `/score`: OpenAI's, Jina's and Cohere's, TEI's, vLLM's and llama.cpp's
fields for the same few things.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from liaoyuan.serving.chat_body import Message, Part, TemplateOptions
from liaoyuan.serving.errors import invalid
from liaoyuan.serving.protocol import IGNORED, NEUTRAL, Asked, Body, Bounded, Text, Truncation, known_fields
from liaoyuan.serving.protocol import TruncationSide as Side

MAX_INPUTS = 2048  # of one request, OpenAI's own limit
# A text, and the ones to be compared with it, by their names in vLLM's versions.
LEFT, RIGHT = ("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")


class Parts(Body):
    """A text in parts, as a message has it."""

    content: Annotated[list[Part], Field(min_length=1)]


class PromptString(Body):
    """A text as llama.cpp also takes it."""

    prompt_string: Text


Mixed = Annotated[list[int | Text], Field(min_length=1)]  # tokens, or tokens and texts
Single = Text | PromptString | Parts


class EmbeddingRequest(Asked):
    """Body of `/v1/embeddings`: texts as `input`, or one conversation as `messages`.

    input: a text, a list of tokens (texts among them are tokenised in their place), or a list of such.
    use_activation: false gives the vector as it is, else its length is 1. embed_dtype, endianness: of the bytes of
    `base64`, as vLLM has them; without them fp32, the lowest byte first.
    """

    input: Single | Annotated[list[Single | int | Mixed], Field(max_length=MAX_INPUTS)] | Mixed | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool | None = None
    encoding_format: Literal["float", "base64"] | None = None
    embed_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    endianness: Literal["native", "little", "big"] | None = None
    dimensions: Bounded | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "EmbeddingRequest":
        if (self.input is None) == (self.messages is None):
            raise invalid("Give one of 'input' and 'messages'.", "input")
        return self


class Document(Body):
    """A text to be ranked."""

    text: Text


Texts = Annotated[list[Text | Document], Field(min_length=1, max_length=MAX_INPUTS)]


class RerankRequest(Asked):
    """Body of `/rerank` (Jina's and Cohere's fields, or with `texts` those of TEI, whose answer is a bare list).

    raw_scores: accepted, without effect: a score is a cosine. truncate: TEI's way to say `truncate_prompt_tokens: -1`.
    """

    query: Text
    documents: Texts | None = None
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)] | None = None
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side | None = None

    @model_validator(mode="after")
    def _one_list(self) -> "RerankRequest":
        if (self.documents is None) == (self.texts is None):
            raise invalid("Give one of 'documents' and 'texts'.", "documents")
        return self

    @property
    def ranked(self) -> list[str]:
        """The texts to be ranked."""
        return [each if isinstance(each, str) else each.text for each in self.texts or self.documents or []]

    @property
    def truncation(self) -> int | None:
        return -1 if self.truncate else self.truncate_prompt_tokens

    @property
    def side(self) -> Side:
        named = self.truncation_side or self.truncation_direction or ("right" if self.truncate else "left")
        return "right" if named.lower() == "right" else "left"


class ScoreRequest(Asked):
    """Body of `/score`: one text with many, or as many with as many, pair by pair."""

    text_1: Text | Texts
    text_2: Text | Texts
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        """Give the two sides their first names."""
        if isinstance(values, Mapping):
            values = dict(values)
            for names in (LEFT, RIGHT):
                given = [name for name in names if values.get(name) is not None]
                if len(given) > 1:
                    raise invalid(f"'{given[0]}' and '{given[1]}' are two names of one thing; give one.", given[1])
                values |= {names[0]: values.pop(given[0])} if given else {}
        return known_fields(values, cls.model_fields, IGNORED, NEUTRAL)
