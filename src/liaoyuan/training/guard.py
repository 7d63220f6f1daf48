"""The spike guard: a step whose loss or gradient norm is far from those before it changes nothing.

As in OLMo 2 (arXiv 2501.00656, sec. 3.1), far is so many standard deviations above the mean of the last steps that
did change something. If spikes come in a row, the run may go back to its newest state and pass over the data between
(PaLM, arXiv 2204.02311, sec. 5.1).
"""

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from liaoyuan.config import Config


class SpikeConfig(Config):
    """What is done about spikes."""

    action: Literal["none", "skip", "roll_back"] = "none"
    deviations: float = Field(6.0, gt=0)  # above the mean
    window: int = Field(128, gt=1)  # steps that are looked back upon
    fewest: int = Field(32, gt=1)  # of them, before anything is taken for a spike
    in_a_row: int = Field(3, gt=0)  # spikes after which a run rolls back


class SpikeGuard:
    """Remembers the losses and gradient norms of the last steps; the same in every process."""

    def __init__(self, config: SpikeConfig, history: Sequence[Sequence[float]] = (), row: int = 0) -> None:
        """`history` and `row` are those of `state()`."""
        self.config = config
        self._steps = [(loss, norm) for loss, norm in history]
        self._row = row

    @property
    def limits(self) -> tuple[float, float]:
        """The highest loss and gradient norm that are no spike."""
        if self.config.action == "none" or len(self._steps) < self.config.fewest:
            return float("inf"), float("inf")
        losses, norms = zip(*self._steps, strict=True)
        return self._limit(losses), self._limit(norms)

    def note(self, loss: float, norm: float, dropped: bool) -> None:
        """Take note of a step; `dropped` says whether it was a spike."""
        self._row = self._row + 1 if dropped else 0
        if not dropped and self.config.action != "none":
            self._steps = [*self._steps, (loss, norm)][-self.config.window :]

    @property
    def wants_to_roll_back(self) -> bool:
        """Whether so many spikes came in a row that the run should go back."""
        return self.config.action == "roll_back" and self._row >= self.config.in_a_row

    def state(self) -> dict[str, object]:
        """Return what a resumed run needs."""
        return {"history": self._steps, "row": self._row}

    def _limit(self, values: Sequence[float]) -> float:
        return statistics.fmean(values) + self.config.deviations * statistics.stdev(values)
