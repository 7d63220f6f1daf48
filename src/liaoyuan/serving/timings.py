"""How long an answer took, in llama.cpp's words and in vLLM's."""

import time
from dataclasses import dataclass, field
from typing import Any

from liaoyuan.serving.text import Piece


@dataclass
class Timings:
    """Counts and times in milliseconds of one answer, as the client's request saw them: waiting is part of them.

    prompt_tokens: of its prompt. begun: when it was asked for, by the monotonic clock.
    """

    prompt_tokens: int
    begun: float = field(default_factory=time.monotonic)
    first: float = 0.0  # when the first token came
    last: float = 0.0  # when the last piece came
    reading: float = 0.0  # when the first piece came that tells how much of the prompt is read

    def saw(self, piece: Piece) -> None:
        """Note that a piece has come."""
        self.last = piece.came
        if piece.read is not None:
            self.reading = self.reading or self.last
        if piece.completion_tokens:
            self.first = self.first or self.last

    def values(self, piece: Piece) -> dict[str, Any]:
        """Return what is known with this piece. The first token comes with the prompt, so it has no time of its own."""
        if piece.read is None:
            first, computed = self.first or self.last, self.prompt_tokens - piece.cached_tokens
            read, written = 1000 * (first - self.begun), 1000 * (self.last - first)
        else:
            read, written, computed = 1000 * (self.last - self.reading), 0.0, piece.read - piece.cached_tokens
        count = piece.completion_tokens
        steps = max(0, count - 1)
        return {
            "cache_n": piece.cached_tokens,
            "prompt_n": computed,
            "prompt_ms": read,
            "prompt_per_token_ms": read / max(computed, 1),
            "prompt_per_second": 1000 * computed / max(read, 1e-3),
            "predicted_n": count,
            "predicted_ms": written,
            "predicted_per_token_ms": written / steps if steps else 0.0,
            "predicted_per_second": 1000 * steps / written if steps and written else 0.0,
        }

    def progress(self, piece: Piece) -> dict[str, Any]:
        """Return how far the prompt is read, by a piece that tells it."""
        return {
            "total": self.prompt_tokens,
            "cache": piece.cached_tokens,
            "processed": piece.read,
            "time_ms": round(1000 * (self.last - self.reading)),
        }

    def metrics(self, piece: Piece) -> dict[str, float]:
        """Return what vLLM says of an answer that ended with this piece; there is no mean of less than two tokens."""
        first, written = 1000 * (self.first - self.begun), 1000 * (self.last - self.first)
        steps = max(0, piece.completion_tokens - 1)
        return {
            "queue_time_ms": 1000 * piece.waited,
            "time_to_first_token_ms": first,
            "generation_time_ms": written,
            **({"mean_itl_ms": written / steps} if steps else {}),
            "tokens_per_second": 1000 * piece.completion_tokens / max(first + written, 1e-3),
        }
