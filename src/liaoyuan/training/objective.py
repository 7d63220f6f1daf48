"""What training minimises, where that is not the cross-entropy of its batches."""

from collections.abc import Sequence
from typing import Protocol

from liaoyuan.data import Batch
from liaoyuan.parallel import Losses, Program, World


class Objective(Protocol):
    """The mean of another loss of log-probabilities, and what is shown beside it; see `loop.train`."""

    def count(self, batch: Batch) -> float:
        """Return how many of what the loss is a mean of are in a microbatch."""
        ...

    def losses(self, program: Program, batches: Sequence[Batch], world: World) -> Losses:
        """Return the loss of this step, given all its microbatches that are this process's."""
        ...

    def values(self, means: Sequence[float]) -> dict[str, float]:
        """Return what the metrics show, given what `losses` gave after the loss, over the count of the step."""
        ...
