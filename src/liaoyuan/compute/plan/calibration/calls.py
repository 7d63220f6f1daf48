"""Calls of operators in real training steps of small models, timed where they are or made again one by one.

So every operator is timed as the program calls it, with the tensors that it has there, on any device; and what a call
must compute and move is told by the same lines as in a dry run.

On a CPU a call is timed inside its step, since it matters what of its tensors lies in the cache: made again and again
it would find all of them there. On a card, which does not work while its host calls, calls are made again in a row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from liaoyuan.compute.plan.program.dry_run import Job, empty_batch
from liaoyuan.compute.plan.program.trace import IGNORED, BelowDTensor, Event, Recorder
from liaoyuan.compute.plan.program.work import Work, work_of
from liaoyuan.data import Batch
from liaoyuan.device import Device
from liaoyuan.models import Decoder
from liaoyuan.ops.choice import operators_called
from liaoyuan.ops.cost import group_of
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
    """A training step that can be taken again: the work of each of its calls, and what each of them is called.

    watch: takes it and returns the seconds of each call, on the host's clock.
    """

    name: str
    works: tuple[Work, ...]
    take: Callable[[], Any]
    names: tuple[str, ...] = ()
    watch: Callable[[], list[float]] = list


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
    random = torch.Generator().manual_seed(0)
    batches = [_on(varied(empty_batch(job, world), job, random), device) for _ in range(job.train.microbatches)]

    def take() -> None:
        take_step(program, optimiser, batches, job.train.learning_rate, job.train.clip, world)

    take()
    recorder = _Calls(program)
    with operators_called(), recorder:
        recorder.restart()
        take()
    events = recorder.trace.events
    step = Step(
        *(name, tuple(work_of(event) for event in events), take, tuple(_name(event) for event in events)),
        lambda: _watched(program, take),
    )
    if device.is_cpu:
        return step, []
    return step, [_timed(event, call) for event, call in recorder.calls.values() if event.operator not in UNTIMED]


def _watched(program: Program, take: Callable[[], Any]) -> list[float]:
    found = list[float]()

    def around(call: Call, compute: Callable[[], Any]) -> Any:
        begin = time.process_time()
        out = compute()
        took = time.process_time() - begin
        if not call.operator.startswith(IGNORED) and group_of(call.operator, call.function) != "views":
            found.append(took)
        return out

    with operators_called(), BelowDTensor(program, around):
        take()
    return found


def streams(device: Device, dtype: torch.dtype) -> list[Timed]:
    """Return calls that only move bytes, into new memory and in place, at four sizes."""
    found = list[Timed]()
    for size in STREAM_BYTES:
        x = torch.ones(size // dtype.itemsize, dtype=dtype, device=device.torch)
        y = torch.ones_like(x)
        recorder = _Calls(Program([]))
        with recorder:
            for operation in (x.add, x.copy_):
                operation(y)
            x.mul_(1.0)
        found += [_timed(event, call) for event, call in recorder.calls.values()]
    return found


def _timed(event: Event, call: Call) -> Timed:
    return Timed(_name(event), work_of(event), lambda: call.function(*call.inputs, **call.named_inputs))


def _name(event: Event) -> str:
    dtype = str(event.dtype).removeprefix("torch.")
    wide = [shape for shape in event.shapes if len(shape) > 1] or event.shapes
    sizes = " ".join(str(list(shape)) for shape in wide[:3])
    return f"{event.operator.removeprefix('aten.')}.{dtype} {sizes} of {len(event.shapes)}"


def varied(batch: Batch, job: Job, random: torch.Generator) -> Batch:
    """Return the batch with random tokens: equal ones would all go to the same experts."""
    tokens = torch.randint(job.model.vocab_size, batch.tokens.shape, generator=random)
    return replace(batch, tokens=tokens, targets=tokens.roll(-1))


def _on(batch: Batch, device: Device) -> Batch:
    moved: dict[str, Any] = {
        field.name: x.to(device.torch)
        for field in fields(batch)
        if isinstance(x := getattr(batch, field.name), torch.Tensor)
    }
    return replace(batch, **moved)


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
