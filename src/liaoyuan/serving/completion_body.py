"""The body of `/v1/completions`."""

from typing import Annotated

from pydantic import Field, model_validator

from liaoyuan.serving.errors import invalid
from liaoyuan.serving.protocol import (
    MAX_CHOICES,
    Sampling,
    Text,
    Tokens,
    Truncation,
    TruncationSide,
)

USUAL_PENALTY = 1.0  # a beam's log-probability per token


class CompletionRequest(Sampling):
    """Body of `/v1/completions`. suffix: what comes after the answer, for models that fill in the middle.

    use_beam_search: the `n` most probable answers, with `length_penalty` as the power of the length that a
        log-probability is divided by (vLLM's).
    """

    prompt: Text | Tokens | Annotated[list[Text] | list[Tokens], Field(max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=-1)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: TruncationSide | None = None
    suffix: Text | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] | None = None

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

    @model_validator(mode="after")
    def _length_penalty_of_beams(self) -> "CompletionRequest":
        if self.length_penalty not in (None, USUAL_PENALTY) and not self.use_beam_search:
            raise invalid("'length_penalty' compares beams: it needs 'use_beam_search'.", "length_penalty")
        return self
