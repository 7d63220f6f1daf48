"""What goes into the engine and what comes out: token ids, never text."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.constraints.constraint import Constraint

RequestId = str | int
TopLogprobs = list[tuple[int, float]]  # (token, log-probability), the most probable first


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    The order is penalties, bias, constraint and bad words, temperature, top_k, top_p, min_p, each on what the one
    before it left (as in Hugging Face `generate`). A sample depends on (seed, position) and the request's own tokens
    alone, never on what else is in the batch.

    max_tokens: the most tokens to generate; None: as many as fit. min_tokens: no end before so many.
    temperature: 0 is greedy. top_p: 1 is off. top_k: 0 is off. min_p: 0 is off.
    repetition_penalty: divides positive logits of tokens that came, prompt included, multiplies negative ones (1: off).
    presence_penalty, frequency_penalty: taken off a generated token's logit, once, and for every time that it came.
    logit_bias: (token, what is added to its logit).
    bad_words: sequences of tokens that must not be generated. allowed_tokens: none else may be; none: all may.
    constraint: what may follow what, such as a grammar.
    seed: None lets the engine number its requests.
    stop_token_ids: generation ends after one of these; it is the last token of the completion.
    top_logprobs: how many of the most probable tokens to report at each place.
    scored_tokens: report these instead, and the one that was drawn.
    prompt_logprobs: log-probabilities of the prompt's own tokens too, with so many rivals; None: none.
    processed_logprobs: report log-probabilities under the distribution that was drawn from, not the model's own.
    return_masks: report which tokens could have been drawn.
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_tokens: tuple[int, ...] = ()
    scored_tokens: tuple[int, ...] = ()
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None
    processed_logprobs: bool = False
    return_masks: bool = False

    def named_tokens(self) -> Iterator[tuple[str, int]]:
        """Yield the tokens that must be of the vocabulary, each with the name of what has it."""
        yield from (("logit_bias", token) for token, _ in self.logit_bias)
        yield from (("allowed_tokens", token) for token in self.allowed_tokens)
        yield from (("scored_tokens", token) for token in self.scored_tokens)

    def check(self) -> None:
        """Raise LiaoyuanError for a value that has no meaning."""
        rules = [
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "from 0 to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("top_logprobs", self.top_logprobs >= 0, "0 or more"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "from 0 to max_tokens"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0 and at most 100"),
            ("presence_penalty", -100.0 <= self.presence_penalty <= 100.0, "from -100 to 100"),
            ("frequency_penalty", -100.0 <= self.frequency_penalty <= 100.0, "from -100 to 100"),
            ("logit_bias", all(np.isfinite(bias) for _, bias in self.logit_bias), "finite numbers"),
            ("bad_words", all(self.bad_words), "sequences of at least one token"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "0 or more"),
        ]
        for name, good, range_ in rules:
            if not good:
                raise LiaoyuanError(f"'{name}' must be {range_} (it is {getattr(self, name)}).")


@dataclass(frozen=True)
class Request:
    """One prompt to continue; `id` is unique among the requests that the engine holds.

    priority: lower ones go first. key: whose request it is; keys of one priority get equal shares.
    salt: prompts of different salts share no cached keys and values. adapter: the name of a loaded adapter, or "".
    timeout: seconds from its arrival after which it ends, with the tokens that it has then; None: never.
    progress: whether events tell how much of the prompt is read, while it is.
    """

    id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    key: str = ""
    salt: str = ""
    adapter: str = ""
    timeout: float | None = None
    progress: bool = False


@dataclass(frozen=True)
class PromptLogprobs:
    """For each token of a prompt after the first: its log-probability, and its most probable rivals."""

    logprobs: list[float]
    top: list[TopLogprobs]


@dataclass(frozen=True)
class Completion:
    """A finished request.

    tokens: the generated ones; ends with the stop token if `finish_reason` is "stop".
    logprobs: of each token under the model's own distribution (temperature 1, nothing filtered), unless the request
        asked for those of the distribution that was drawn from.
    finish_reason: "stop", "length", "timeout" or "abort".
    top_logprobs: one list a token if the request asked for them, else empty.
    versions: of the weights that made each token.
    prompt: log-probabilities of the prompt if the request asked for them.
    masks: what could have been drawn, int32 [ceil(V / 32)] a token (the lowest bit first), if the request asked for it.
    cached_tokens: how many tokens of the prompt were found in the prefix cache.
    """

    id: RequestId
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt: PromptLogprobs | None = None
    masks: list[np.ndarray] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass(frozen=True)
class Event:
    """What one step gave one request; `finish_reason` is None while it goes on, "abort" if it was aborted.

    error: why, if it ended with "error".
    version: of the weights that made these tokens. prompt, cached_tokens: see `Completion`; with the first event alone.
    waited: seconds from the request's arrival until it was first computed.
    read: how many tokens of the prompt are in the cache, if the event tells only that.
    """

    id: RequestId
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None = None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    version: int = 0
    prompt: PromptLogprobs | None = None
    masks: list[np.ndarray] = field(default_factory=list)
    cached_tokens: int = 0
    error: str = ""
    waited: float = 0.0
    read: int | None = None
