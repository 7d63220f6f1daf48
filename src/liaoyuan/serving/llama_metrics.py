"""llama.cpp's names of what `/metrics` says, for boards and alarms that were made for them.

As text, since some are of a kind that `prometheus_client` gives other names. Rates are of the time since the last look,
as they are there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEAD = "# HELP llamacpp:{0} {2}\n# TYPE llamacpp:{0} {1}\nllamacpp:{0} {3}\n"


@dataclass
class Spent:
    """What answers have taken so far: seconds until their first tokens and after them, and the longest, in tokens.

    further: tokens after the first ones, which are what those seconds are for.
    embedded: tokens of texts that were embedded. embeddings: requests for it.
    """

    reading: float = 0.0
    writing: float = 0.0
    further: int = 0
    longest: int = 0
    embedded: int = 0
    embeddings: int = 0


@dataclass
class LlamaMetrics:
    """Says them, and remembers what it said."""

    spent: Spent
    _looked: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def text(self, state: Mapping[str, Any]) -> str:
        """Return the metrics in Prometheus' text format; state: what the engine says of itself."""
        spent, known = self.spent, {"running": 0, "waiting": 0, **state}
        cached = known.get("prefix_hit_tokens", 0)
        read = known.get("prefix_asked_tokens", 0) - cached + spent.embedded
        written, steps = known.get("generated_tokens", 0), known.get("steps", 0) + spent.embeddings
        now = (read, spent.reading, spent.further, spent.writing)
        news = [new - old for new, old in zip(now, self._looked, strict=True)]
        self._looked = now
        rows = [
            ("prompt_tokens_total", "counter", "Tokens of prompts computed.", read),
            ("prompt_tokens_cached_total", "counter", "Tokens of prompts found in the prefix cache.", cached),
            ("prompt_seconds_total", "counter", "Seconds until first tokens.", spent.reading),
            ("tokens_predicted_total", "counter", "Tokens generated.", written),
            ("tokens_predicted_seconds_total", "counter", "Seconds after first tokens.", spent.writing),
            ("n_decode_total", "counter", "Batches computed.", steps),
            ("n_tokens_max", "counter", "Tokens of the longest prompt with its answer.", spent.longest),
            ("spec_decode_num_draft_tokens_total", "counter", "Tokens guessed.", known.get("guessed_tokens", 0)),
            ("spec_decode_num_accepted_tokens_total", "counter", "Of these right.", known.get("guessed_right", 0)),
            ("spec_decode_num_drafts_total", "counter", "Times that guesses were tried.", known.get("guesses", 0)),
            ("prompt_tokens_seconds", "gauge", "Tokens of prompts a second.", _rate(*news[:2])),
            ("predicted_tokens_seconds", "gauge", "Tokens generated a second.", _rate(*news[2:])),
            ("requests_processing", "gauge", "Requests in the batch.", known["running"]),
            ("requests_deferred", "gauge", "Requests in the queue.", known["waiting"]),
            ("n_busy_slots_per_decode", "gauge", "Answers that a batch goes on with.", written / max(1, steps)),
        ]
        return "".join(HEAD.format(*row) for row in rows)


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
