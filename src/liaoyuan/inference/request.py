"""What goes into the engine and what comes out: token ids, never text."""

from dataclasses import dataclass, field

from liaoyuan.errors import LiaoyuanError

RequestId = str | int
TopLogprobs = list[tuple[int, float]]  # (token, log-probability), the most probable first


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    The order is temperature, top_k, top_p, min_p, each on what the one before it left (as in Hugging Face `generate`).
    A sample depends on (seed, position) and the request's own tokens alone, never on what else is in the batch.

    max_tokens: the most tokens to generate; None: as many as fit.
    temperature: 0 is greedy. top_p: 1 is off. top_k: 0 is off. min_p: 0 is off.
    seed: None lets the engine number its requests.
    stop_token_ids: generation ends after one of these; it is the last token of the completion.
    top_logprobs: how many of the most probable tokens to report at each place.
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0

    def check(self) -> None:
        """Raise LiaoyuanError for a value that has no meaning."""
        rules = [
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "from 0 to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("top_logprobs", 0 <= self.top_logprobs <= 1000, "from 0 to 1000"),
        ]
        for name, good, range_ in rules:
            if not good:
                raise LiaoyuanError(f"'{name}' must be {range_} (it is {getattr(self, name)}).")


@dataclass(frozen=True)
class Request:
    """One prompt to continue; `id` is unique among the requests that the engine holds."""

    id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()


@dataclass(frozen=True)
class Completion:
    """A finished request.

    tokens: the generated ones; ends with the stop token if `finish_reason` is "stop".
    logprobs: of each token under the model's own distribution (temperature 1, nothing filtered).
    finish_reason: "stop" or "length".
    top_logprobs: one list a token if the request asked for them, else empty.
    """

    id: RequestId
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """What one step gave one request; `finish_reason` is None while it goes on, "abort" if it was aborted."""

    id: RequestId
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None = None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
