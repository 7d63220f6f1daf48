"""Decode steps as device graphs: captured once for a size, replayed with new numbers, so that launching costs nothing.

Steps of pure decode are filled up to a few sizes: rows and block tables to powers of two, with rows that belong to no
sequence and write to no block. What is captured reads and writes the same memory each time, so inputs are copied in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liaoyuan.inference.plan import Plan

Inputs = tuple[Tensor, ...]  # tokens, positions, cache_slots, block_tables, query_starts, lengths, rows
Compute = Callable[[Inputs], Tensor]
Replay = Callable[[], None]
WARM_UP = 2  # runs before a capture: kernels are compiled and buffers made


@dataclass(frozen=True)
class _Captured:
    inputs: Inputs
    logits: Tensor
    replay: Replay


class DecodeGraphs:
    """Captured steps of one model and cache, by size."""

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        capture: Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]] | None = None,
    ) -> None:
        """capture: runs a function and returns its result, and what computes it anew into the same memory."""
        self._compute, self._device = compute, device
        self._capture = capture or capture_on_device
        self._captured: dict[tuple[int, int], _Captured] = {}

    def logits(self, plan: Plan) -> Tensor | None:
        """Return the logits [S, V] of a step in which every sequence computes one token; None for any other."""
        count = len(plan.slots)
        if not len(plan.tokens) == len(plan.rows) == count:
            return None
        size = _power_of_two(count), _power_of_two(plan.block_tables.shape[1])
        found = self._captured.get(size)
        if found is None:
            inputs = tuple(torch.from_numpy(values).to(self._device) for values in _filled(plan, *size))
            found = self._captured[size] = _Captured(inputs, *self._capture(lambda: self._compute(inputs)))
        else:
            for static, values in zip(found.inputs, _filled(plan, *size), strict=True):
                static.copy_(torch.from_numpy(values), non_blocking=True)
        found.replay()
        return found.logits[:count]

    def forget(self) -> None:
        """Forget what was captured: the memory that it reads is another's from now on."""
        self._captured.clear()


def capture_on_device(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """Capture a function in a graph of the current accelerator (CUDA, Ascend)."""
    stream = torch.Stream()
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        for _ in range(WARM_UP):
            function()
    torch.accelerator.synchronize()
    graph = torch.accelerator.Graph()
    with stream, graph:
        result = function()
    torch.accelerator.current_stream().wait_stream(stream)
    return result, graph.replay


def _filled(plan: Plan, rows: int, blocks: int) -> tuple[np.ndarray, ...]:
    """Return a plan's arrays filled up to a size; the other rows belong to nobody."""
    count = len(plan.slots)
    tables = np.zeros((rows, blocks), dtype=np.int32)
    tables[:count, : plan.block_tables.shape[1]] = plan.block_tables
    return (
        _longer(plan.tokens, rows, 0),
        _longer(plan.positions, rows, 0),
        _longer(plan.cache_slots, rows, -1),
        tables,
        _longer(plan.query_starts, rows + 1, count),
        _longer(plan.lengths, rows, 0),
        np.arange(rows),
    )


def _longer(values: np.ndarray, size: int, filling: int) -> np.ndarray:
    made = np.full(size, filling, dtype=values.dtype)
    made[: len(values)] = values
    return made


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
