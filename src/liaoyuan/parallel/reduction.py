"""The reduction of FSDP's gradients on devices without streams: behind computing, and without rounding on the way.

`fully_shard` waits for its reduce-scatter where there are no streams, and gloo makes of it an all-reduce, in fp32.
Here each process sends every other its piece of the gradient, in the precision in which it was computed, while the
backward pass goes on, and adds up in fp32 at least what it was sent when the next unit's gradients set out. As in
`fully_shard` itself at most one unit is under way, so that gradients do not pile up.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from liaoyuan.ops import wide


@dataclass
class _Underway:
    work: Any
    pieces: Tensor  # [size, n]: this process's piece of every process's gradient
    total: Tensor  # [n], to be filled
    leaving: Tensor  # what is sent must live so long


class Reduction(ReduceScatter):
    """What all units of a model reduce with; `finish` must be called after a backward pass."""

    def __init__(self, overlap: bool) -> None:
        self.overlap = overlap
        self._underway: _Underway | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if op != dist.ReduceOp.SUM:
            raise NotImplementedError(f"gradients are added up here, not reduced by {op}")
        self.finish()
        pieces = torch.empty_like(input_tensor)
        work = dist.all_to_all_single(pieces, input_tensor, group=group, async_op=True)
        self._underway = _Underway(work, pieces.view(group.size(), -1), output_tensor, input_tensor)
        if not self.overlap:
            self.finish()

    def finish(self) -> None:
        """Wait for the gradients that are under way and add them up."""
        if self._underway:
            self._underway.work.wait()
            self._underway.total.copy_(wide(self._underway.pieces).sum(0))
            self._underway = None
