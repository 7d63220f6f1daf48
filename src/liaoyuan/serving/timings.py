"""How long an answer took, in llama.cpp's words."""

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

    def saw(self, piece: Piece) -> None:
        """Note that a piece has come."""
        if piece.completion_tokens:
            self.first = self.first or time.monotonic()

    def values(self, piece: Piece) -> dict[str, Any]:
        """Return what is known with this piece. The first token comes with the prompt, so it has no time of its own."""
        first = self.first or time.monotonic()
        read, written = 1000 * (first - self.begun), 1000 * (time.monotonic() - first)
        computed, count = self.prompt_tokens - piece.cached_tokens, piece.completion_tokens
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
