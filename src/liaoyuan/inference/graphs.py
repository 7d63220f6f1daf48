"""Decode steps as device graphs: captured once for a size, replayed with new numbers, so that launching costs nothing.

Steps of pure decode are filled up to a few sizes: rows and block tables to powers of two, with rows that belong to no
sequence and write to no block. What is captured reads and writes the same memory each time, so inputs are copied in.
Several steps are one copy in, a replay each, which takes the tokens that the one before it drew, and one copy out.
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
Captured = tuple[Tensor, Tensor]  # logits, and what was sampled from them and those of the steps before
WARM_UP = 2  # runs before a capture: kernels are compiled and buffers made
ALIGNED = 16  # bytes


@dataclass(frozen=True)
class _Step:
    """A captured step. host: its inputs as arrays, all of which `staged` is; static: where they are on the device.

    results: logits [rows, V] of the last step, and what all steps drew, fp64 [most_steps, 3, rows].
    """

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
        most_steps: int,
        capture: Callable[[Callable[[], Captured]], tuple[Captured, Replay]] | None = None,
    ) -> None:
        """most_steps: of a plan. capture: runs a function and returns its result, and what computes it anew into the
        same memory.
        """
        self._compute, self._device, self._most_steps = compute, device, most_steps
        self._capture = capture or capture_on_device
        self._captured: dict[tuple[int, int], _Step] = {}

    def run(self, plan: Plan, table: np.ndarray) -> Captured | None:
        """Return the logits [S, V] of the last step of a plan in which every sequence computes one token, and what all
        draw where `table` fp64 [R, 8] is all that decides it, fp64 [3, R] (see `sampling.as_one`); None for any other
        plan.
        """
        count, steps = len(plan.slots), plan.steps
        if not len(plan.tokens) == len(plan.samplers) // steps == len(plan.rows) == count:
            return None
        size = _power_of_two(count), _power_of_two(plan.block_tables.shape[1])
        arrays = _filled(plan, table, *size, self._most_steps)
        found = self._captured.get(size)
        if found is None:
            found = self._captured[size] = self._new(arrays)
        for array, values in zip(found.host, arrays, strict=True):
            array[:] = values
        found.static.copy_(found.staged, non_blocking=True)
        for _ in range(steps):
            found.replay()
        logits, sampled = found.results
        return logits[:count], sampled[:steps, :, :count].permute(1, 2, 0).flatten(1)

    def _new(self, arrays: tuple[np.ndarray, ...]) -> _Step:
        """Capture the step of these inputs, which lie one behind the other, so that one copy brings them all.

        What runs before the capture takes further steps than the plan has, in which nobody is.
        """
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
        done, tokens, block_tables, rows, *of_steps = parts(static)
        drawn = torch.zeros(self._most_steps, 3, len(rows), dtype=torch.float64, device=self._device)

        def step() -> Captured:
            now = done.clamp_max(self._most_steps - 1)
            positions, slots, starts, lengths, table = (each.index_select(0, now)[0] for each in of_steps)
            logits = self._compute((tokens, positions, slots, block_tables, starts, lengths, rows))
            sampled = as_one(sample_tokens(logits, table))
            drawn.index_copy_(0, now, sampled[None])
            tokens.copy_(sampled[0])
            done.add_(1)
            return logits, drawn

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


def _filled(plan: Plan, table: np.ndarray, rows: int, blocks: int, most_steps: int) -> tuple[np.ndarray, ...]:
    """Return a plan's arrays and its settings filled up to a size; the other rows and steps belong to nobody."""
    count, steps = len(plan.slots), plan.steps
    starts = np.zeros((most_steps, rows + 1), dtype=np.int32)
    starts[:steps] = _larger(plan.query_starts, (rows + 1,), count)
    return (
        np.zeros(1, dtype=np.int64),  # steps that are done
        _larger(plan.tokens, (rows,), 0),
        _larger(plan.block_tables, (rows, blocks), 0),
        np.arange(rows),
        _larger(plan.positions.reshape(steps, count), (most_steps, rows), 0),
        _larger(plan.cache_slots.reshape(steps, count), (most_steps, rows), -1),
        starts,
        _larger(plan.lengths + np.arange(steps, dtype=np.int32)[:, None], (most_steps, rows), 0),
        _larger(table.reshape(count, steps, -1).swapaxes(0, 1), (most_steps, rows, table.shape[1]), 0),
    )


def _larger(values: np.ndarray, shape: tuple[int, ...], filling: int) -> np.ndarray:
    made = np.full(shape, filling, dtype=values.dtype)
    made[tuple(slice(size) for size in values.shape)] = values
    return made


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
