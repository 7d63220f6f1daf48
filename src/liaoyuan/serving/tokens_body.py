"""The bodies of `/tokenize` and `/detokenize`."""

from typing import Annotated

from pydantic import Field, model_validator

from liaoyuan.serving.chat_body import MAX_TOOLS, Message, TemplateOptions, Tool
from liaoyuan.serving.errors import invalid
from liaoyuan.serving.protocol import Asked, Text, Tokens


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
