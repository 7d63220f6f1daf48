"""Decode steps as device graphs: captured once for a size, replayed with new numbers, so that launching costs nothing.

Steps of pure decode are filled up to a few sizes: rows and block tables to powers of two, with rows that belong to no
sequence and write to no block. What is captured reads and writes the same memory each time, so inputs are copied in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liaoyuan.device import Device
from liaoyuan.inference.plan import Plan
from liaoyuan.inference.sampling import as_one
from liaoyuan.ops import sample_tokens

Inputs = tuple[Tensor, ...]  # tokens, positions, cache_slots, block_tables, query_starts, lengths, rows
Compute = Callable[[Inputs], Tensor]
Replay = Callable[[], None]
Captured = tuple[Tensor, Tensor]  # logits, and what was sampled from them
WARM_UP = 2  # runs before a capture: kernels are compiled and buffers made
ALIGNED = 16  # bytes


@dataclass(frozen=True)
class _Step:
    """A captured step. host: its inputs as arrays, all of which `staged` is; static: where they are on the device."""

    host: tuple[np.ndarray, ...]
    staged: Tensor
    static: Tensor
    results: Captured
    replay: Replay


class DecodeGraphs:
    """Captured steps of one model and cache, by size."""

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        capture: Callable[[Callable[[], Captured]], tuple[Captured, Replay]] | None = None,
    ) -> None:
        """capture: runs a function and returns its result, and what computes it anew into the same memory."""
        self._compute, self._device = compute, device
        self._capture = capture or capture_on_device
        self._captured: dict[tuple[int, int], _Step] = {}

    def run(self, plan: Plan, table: np.ndarray) -> Captured | None:
        """Return the logits [S, V] of a step in which every sequence computes one token, and what is drawn from them
        where `table` fp64 [S, 8] is all that decides it, fp64 [3, S] (see `sampling.as_one`); None for any other step.
        """
        count = len(plan.slots)
        if not len(plan.tokens) == len(plan.samplers) == len(plan.rows) == count:
            return None
        size = _power_of_two(count), _power_of_two(plan.block_tables.shape[1])
        found = self._captured.get(size)
        if found is None:
            found = self._captured[size] = self._new(_filled(plan, table, *size))
        else:
            for array, values in zip(found.host, _filled(plan, table, *size), strict=True):
                array[:] = values
            found.static.copy_(found.staged, non_blocking=True)
        found.replay()
        logits, sampled = found.results
        return logits[:count], sampled[:, :count]

    def _new(self, arrays: tuple[np.ndarray, ...]) -> _Step:
        """Capture the step of these inputs, which lie one behind the other, so that one copy brings them all."""
        ends = np.cumsum([-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays]).tolist()
        staged = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=Device(self._device.type).captures_graphs)
        static = torch.empty_like(staged, device=self._device)

        def parts(of: Tensor) -> tuple[Tensor, ...]:
            lie = zip(arrays, [0, *ends], strict=False)
            return tuple(
                of[at : at + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape) for array, at in lie
            )

        host = tuple(part.numpy() for part in parts(staged))
        for array, values in zip(host, arrays, strict=True):
            array[:] = values
        static.copy_(staged)
        *inputs, table = parts(static)

        def step() -> Captured:
            logits = self._compute(tuple(inputs))
            return logits, as_one(sample_tokens(logits, table))

        return _Step(host, staged, static, *self._capture(step))

    def forget(self) -> None:
        """Forget what was captured: the memory that it reads is another's from now on."""
        self._captured.clear()


def capture_on_device(function: Callable[[], Captured]) -> tuple[Captured, Replay]:
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


def _filled(plan: Plan, table: np.ndarray, rows: int, blocks: int) -> tuple[np.ndarray, ...]:
    """Return a plan's arrays and its settings filled up to a size; the other rows belong to nobody."""
    count = len(plan.slots)
    settings = np.zeros((rows, table.shape[1]))
    settings[:count] = table
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
        settings,
    )


def _longer(values: np.ndarray, size: int, filling: int) -> np.ndarray:
    made = np.full(size, filling, dtype=values.dtype)
    made[: len(values)] = values
    return made


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
