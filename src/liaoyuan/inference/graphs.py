"""Decode steps as graphs: captured once for a size, replayed with new numbers, so that launching costs nothing.

On a device steps of pure decode are filled up to a few sizes: rows and block tables to powers of two, with rows that
belong to no sequence and write to no block. On a CPU, where a row costs what it computes and to capture is to record a
step as it is made, rows are as many as there are. What is captured reads the same memory each time, so inputs are
copied in.
Several steps are one copy in, a replay each, which takes the tokens that the one before it drew, and one copy out.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from liaoyuan.device import Device
from liaoyuan.inference.plan import Plan
from liaoyuan.inference.sampling import as_one
from liaoyuan.ops import sample_tokens
from liaoyuan.ops.recording import Recording

Inputs = tuple[Tensor, ...]  # tokens, positions, cache_slots, block_tables, query_starts, lengths, rows
Compute = Callable[[Inputs], Tensor]
Step = Callable[[], tuple[Tensor, ...]]  # gives logits, and what `sample_tokens` gives of them
Like = tuple[tuple[int, ...], type]  # shape and type of an array
WARM_UP = 2  # runs before a capture: kernels are compiled and buffers made
ALIGNED = 16  # bytes
MOST_SIZES = 4  # that are kept where rows are not filled up


@dataclass(frozen=True)
class Buffers:
    """What captured steps read and write, on the device. tokens: int64 [rows].

    steps: uint8 [most_steps, bytes], all that differs from step to step; now: [1, bytes], what the present step reads.
    done: int64 [1], steps; drawn: fp64 [most_steps, 3, rows], see `sampling.as_one`.
    """

    tokens: Tensor
    steps: Tensor
    now: Tensor
    done: Tensor
    drawn: Tensor


class Follow(Protocol):
    """Some captured steps, one after the other."""

    def __call__(self, count: int, all_logits: bool) -> list[Tensor]:
        """Take `count` steps and return the logits of each, or with `all_logits` off of the last alone."""
        ...


@dataclass(frozen=True)
class Way:
    """How a device captures.

    is_padded: whether rows are filled up, so that there are few sizes. If not, a size is captured when it comes for the
    second time in a row, and those that came last are kept.
    """

    capture: Callable[[Step, Buffers], Follow]
    is_padded: bool


@dataclass(frozen=True)
class _Captured:
    """Steps of one size. host: their inputs as arrays, all of which `staged` is; static: that on the device."""

    host: tuple[np.ndarray, ...]
    staged: Tensor
    static: Tensor
    buffers: Buffers
    follow: Follow


class DecodeGraphs:
    """Captured steps of one model and cache, by size."""

    def __init__(self, compute: Compute, device: torch.device, most_steps: int) -> None:
        """most_steps: of a plan."""
        self._compute, self._device, self._most_steps = compute, device, most_steps
        self._way = ON_CPU if device.type == "cpu" else ON_DEVICE
        self._captured: OrderedDict[tuple[int, int], _Captured] = OrderedDict()
        self._before = (0, 0)  # the last size that came

    def run(self, plan: Plan, table: np.ndarray, all_logits: bool = False) -> tuple[Tensor, Tensor] | None:
        """Return the logits of a plan in which every sequence computes one token a step, and what is drawn from them
        where `table` fp64 [R, 8] is all that decides it, fp64 [3, R] (see `sampling.as_one`); None for any other plan.

        all_logits: give those of all steps, [R, V]; else of the last one alone, [S, V].
        """
        count, steps = len(plan.slots), plan.steps
        if not len(plan.tokens) == len(plan.samplers) // steps == len(plan.rows) == count:
            return None
        size = _power_of_two(count) if self._way.is_padded else count, _power_of_two(plan.block_tables.shape[1])
        before, self._before = self._before, size
        if size not in self._captured and size != before and not self._way.is_padded:
            return None
        found = self._captured.get(size) or self._new(size, plan, table)
        self._captured.move_to_end(size)
        _fill(found.host, plan, table, self._way.is_padded)
        if found.static is not found.staged:
            found.static.copy_(found.staged, non_blocking=True)
        logits = [one[:count] for one in found.follow(steps, all_logits)]
        drawn = found.buffers.drawn[:steps, :, :count].permute(1, 2, 0).flatten(1)
        return logits[0] if len(logits) == 1 else torch.stack(logits, 1).flatten(0, 1), drawn

    def forget(self) -> None:
        """Forget what was captured: the memory that it reads is another's from now on."""
        self._captured.clear()

    def _new(self, size: tuple[int, int], plan: Plan, table: np.ndarray) -> _Captured:
        """Capture steps like a plan's. Inputs lie one behind the other, so that one copy brings them all; what differs
        from step to step is last, all of a step together.
        """
        if len(self._captured) == MOST_SIZES and not self._way.is_padded:
            self._captured.popitem(last=False)
        (rows, blocks), most, device = size, self._most_steps, self._device
        once: list[Like] = [((1,), np.int64), ((rows,), np.int64), ((rows, blocks), np.int32), ((rows,), np.int64)]
        each: list[Like] = [((rows,), np.int64), ((rows,), np.int64), ((rows + 1,), np.int32), ((rows,), np.int32)]
        each.append(((rows, table.shape[1]), np.float64))
        first, width = _length(once), _length(each)
        pinned = Device(device.type).captures_graphs
        staged = torch.zeros(first + most * width, dtype=torch.uint8, pin_memory=pinned)
        static = staged if device.type == "cpu" else torch.empty_like(staged, device=device)
        now = torch.zeros(1, width, dtype=torch.uint8, device=device)
        host = *_parts(staged, once), *_parts(staged[first:].view(most, width), each)
        arrays = tuple(part.numpy() for part in host)
        _fill(arrays, plan, table, True)
        static.copy_(staged)
        done, tokens, block_tables, indices = _parts(static, once)
        positions, slots, starts, lengths, settings = (part[0] for part in _parts(now, each))
        drawn = torch.zeros(most, 3, rows, dtype=torch.float64, device=device)
        buffers = Buffers(tokens, static[first:].view(most, width), now, done, drawn)

        def step() -> tuple[Tensor, ...]:
            logits = self._compute((tokens, positions, slots, block_tables, starts, lengths, indices))
            return logits, *sample_tokens(logits, settings)

        made = self._captured[size] = _Captured(arrays, staged, static, buffers, self._way.capture(step, buffers))
        return made


def can_capture(device: torch.device) -> bool:
    """Whether decode steps are captured on a device, if nobody says otherwise."""
    return device.type == "cpu" or Device(device.type).captures_graphs


def capture_on_device(step: Step, buffers: Buffers) -> Follow:
    """Capture a step in a graph of the current accelerator (CUDA, Ascend)."""
    most = len(buffers.steps)

    def whole() -> Tensor:
        number = buffers.done.clamp_max(most - 1)  # what runs before the capture may go on where nobody is
        torch.index_select(buffers.steps, 0, number, out=buffers.now)
        logits, *sampled = step()
        found = as_one(sampled)
        buffers.drawn.index_copy_(0, number, found[None])
        buffers.tokens.copy_(found[0])
        buffers.done.add_(1)
        return logits

    logits, replay = captured(whole)

    def follow(count: int, all_logits: bool) -> list[Tensor]:
        kept = []
        for _ in range(count):
            replay()
            if all_logits and count > 1:
                kept.append(logits.clone())  # the next step writes there
        return kept or [logits]

    return follow


def captured(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Return what a function gives, and what computes it anew into the same memory."""
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


def record_on_cpu(step: Step, buffers: Buffers) -> Follow:
    """Record the first step that is taken, and make its calls again for those that follow it."""
    recording = Recording(step)

    def follow(count: int, all_logits: bool) -> list[Tensor]:
        taken = 0
        kept = []
        while taken < count and not recording.is_recorded:
            buffers.now.copy_(buffers.steps[taken])
            logits, *sampled = recording()
            buffers.drawn[taken] = as_one(sampled)
            buffers.tokens.copy_(buffers.drawn[taken, 0])
            kept.append(logits)
            taken += 1
        if taken < count:
            kept += recording.follow(buffers.steps[taken:count], buffers.now, buffers.tokens, buffers.drawn[taken:])
        return kept if all_logits else kept[-1:]

    return follow


ON_DEVICE = Way(capture_on_device, is_padded=True)
ON_CPU = Way(record_on_cpu, is_padded=False)


def _length(arrays: list[Like]) -> int:
    return sum(-(-_bytes(one) // ALIGNED) * ALIGNED for one in arrays)


def _bytes(one: Like) -> int:
    return math.prod(one[0]) * np.dtype(one[1]).itemsize


def _parts(memory: Tensor, arrays: list[Like]) -> list[Tensor]:
    """Return arrays that lie one behind the other in memory, uint8 [bytes] or [n, bytes], as tensors [...] or
    [n, ...].
    """
    found, at = [], 0
    for shape, kind in arrays:
        part = memory[..., at : at + _bytes((shape, kind))].view(torch.from_numpy(np.empty(0, kind)).dtype)
        found.append(part.unflatten(-1, shape))
        at += _length([(shape, kind)])
    return found


def _fill(arrays: tuple[np.ndarray, ...], plan: Plan, table: np.ndarray, is_padded: bool) -> None:
    """Write a plan and its settings. is_padded: there is more room, in rows or steps, which belongs to nobody."""
    done, tokens, block_tables, indices, positions, slots, starts, lengths, settings = arrays
    count, steps = len(plan.slots), plan.steps
    if is_padded:
        indices[:] = np.arange(len(indices))
        for array, filling in zip(arrays, (0, 0, 0, indices, 0, -1, 0, 0, 0), strict=True):
            array[...] = filling
        starts[:steps] = count
    done[0] = 0
    tokens[:count] = plan.tokens
    block_tables[:count, : plan.block_tables.shape[1]] = plan.block_tables
    positions[:steps, :count] = plan.positions.reshape(steps, count)
    slots[:steps, :count] = plan.cache_slots.reshape(steps, count)
    starts[:steps, : count + 1] = plan.query_starts
    lengths[:steps, :count] = plan.lengths + np.arange(steps)[:, None]
    settings[:steps, :count] = table.reshape(count, steps, -1).swapaxes(0, 1)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
