"""Calls of operators that are taken from real training steps of small models, to be made again and timed one by one.

So every operator is timed as the program calls it, with the tensors that it has there, on any device; and what a call
must compute and move is told by the same lines as in a dry run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from liaoyuan.compute.plan.dry_run import Job, empty_batch
from liaoyuan.compute.plan.trace import Event, Recorder
from liaoyuan.compute.plan.work import Work, work_of
from liaoyuan.data import Batch
from liaoyuan.device import Device
from liaoyuan.models import Decoder
from liaoyuan.ops.choice import operators_called
from liaoyuan.ops.watch import Call
from liaoyuan.parallel import Program, World, lay_out
from liaoyuan.training.loop import make_optimiser, take_step

UNTIMED = ("aten._local_scalar_dense",)  # waits for the device instead of working
MB = 2**20
STREAM_BYTES = (MB // 16, MB, 8 * MB, 64 * MB)


@dataclass(frozen=True)
class Timed:
    """A call that can be made again: what it asks of the card, and how to make it."""

    name: str
    work: Work
    make: Callable[[], Any]


@dataclass(frozen=True)
class Step:
    """A training step that can be taken again, and the work of each of its calls."""

    name: str
    works: tuple[Work, ...]
    take: Callable[[], Any]


class _Calls(Recorder):
    """A recorder that keeps one call of each kind and shape."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.calls: dict[Any, tuple[Event, Call]] = {}

    def _take(self, call: Call, compute: Callable[[], Any]) -> Any:
        before = len(self.trace.events)
        out = super()._take(call, compute)
        for event in self.trace.events[before:]:
            self.calls.setdefault((event.operator, event.dtype, event.shapes), (event, call))
        return out


def step_of(job: Job, device: Device, name: str) -> tuple[Step, list[Timed]]:
    """Return a step of a job of one process with real memory, and one call of each kind that it makes."""
    world = World(device=device).arrange(job.resolved)
    with torch.device("meta"):
        model = Decoder(job.model).to(job.model.torch_dtype)
    program = lay_out(model, job.resolved, world).initialise(0)
    optimiser = make_optimiser(program, job.train, world)
    batches = [_on(empty_batch(job, world), device) for _ in range(job.train.microbatches)]

    def take() -> None:
        take_step(program, optimiser, batches, job.train.learning_rate, job.train.clip, world)

    take()
    with operators_called(), _Calls(program) as recorder:
        recorder.restart()
        take()
    works = tuple(work_of(event) for event in recorder.trace.events)
    timed = [_timed(event, call) for event, call in recorder.calls.values() if event.operator not in UNTIMED]
    return Step(name, works, take), timed


def streams(device: Device, dtype: torch.dtype) -> list[Timed]:
    """Return calls that only move bytes, into new memory and in place, at four sizes."""
    found = list[Timed]()
    for size in STREAM_BYTES:
        x = torch.ones(size // dtype.itemsize, dtype=dtype, device=device.torch)
        y = torch.ones_like(x)
        program = Program([])
        with _Calls(program) as recorder:
            for operation in (x.add, x.copy_):
                operation(y)
            x.mul_(1.0)
        found += [_timed(event, call) for event, call in recorder.calls.values()]
    return found


def _timed(event: Event, call: Call) -> Timed:
    dtype = str(event.dtype).removeprefix("torch.")
    sizes = " ".join(str(list(shape)) for shape in event.shapes[:2])
    name = f"{event.operator.removeprefix('aten.')}.{dtype} {sizes}"
    return Timed(name, work_of(event), lambda: call.function(*call.inputs, **call.named_inputs))


def _on(batch: Batch, device: Device) -> Batch:
    moved = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: x.to(device.torch) for name, x in moved.items() if isinstance(x, torch.Tensor)})


class Clock:
    """Times work: on a CPU by the time that it computed for this process, so that others there count less."""

    def __init__(self, device: Device) -> None:
        self._device, self.is_cpu = device, device.is_cpu

    def seconds(self, make: Callable[[], Any], least: float) -> float:
        """Return the seconds of a call, one after another for `least` seconds after one that is not counted."""
        with torch.no_grad():
            make()
            count, once = 1, self._of(make, 1)
            if once < least:
                count = max(1, min(int(least / max(once, 1e-7)), 10_000))
                once = self._of(make, count)
        return once

    def step(self, take: Callable[[], Any]) -> float:
        """Return the seconds of a training step."""
        return self._of(take, 1)

    def _of(self, make: Callable[[], Any], count: int) -> float:
        now = time.process_time if self._device.is_cpu else time.perf_counter
        self._device.synchronize()
        begin = now()
        for _ in range(count):
            make()
        self._device.synchronize()
        return (now() - begin) / count
