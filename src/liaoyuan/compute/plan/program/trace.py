"""What one process of a training program does in a step, call by call, and the memory that it holds meanwhile.

A `Recorder` stands below DTensor and sees what this process computes: its own parts of weights, gathered ones, and
every collective, backward passes and the optimiser included. It records real runs and hollow ones alike, so that a
prediction and a measurement are made by the same lines.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from liaoyuan.ops.cost import cost_of, group_of
from liaoyuan.ops.watch import Call, Phase, Watch, tensors_in
from liaoyuan.parallel import Program
from liaoyuan.parallel.traffic import Collective, Collectives, Traffic, count

IGNORED = ("prim.", "profiler.")  # questions and marks, which do nothing
FILLED = ("c10d::alltoall_base_", "c10d::alltoall_", "c10d::recv_", "c10d::recv_any_source_")  # their first argument


@dataclass(frozen=True)
class Event:
    """One call of an operator by the process.

    reads, writes: numbers of the memory blocks that it reads and writes, which order what depends on what.
    shapes: of its tensors, inputs first. flops: of matrix products. traffic: bytes read and written.
    live: bytes of tensors that the process holds after it.
    """

    operator: str
    module: str
    phase: Phase
    group: str
    dtype: torch.dtype
    flops: int
    traffic: int
    shapes: tuple[tuple[int, ...], ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    live: int
    collective: Collective | None = None


@dataclass(frozen=True)
class Held:
    """Memory at the peak: bytes of the tensors that one module's operator made in one phase."""

    module: str
    operator: str
    phase: Phase
    bytes: int
    tensors: int


@dataclass
class Mark:
    """Where a part of the step begins: at the call of this number, with so many bytes held, `peak` at most in it."""

    name: str
    event: int
    live: int
    peak: int


@dataclass
class Trace:
    """The calls of a step in order; `before` bytes were held when it began, `peak` at most, by `held` then; `after` in
    the end.

    marks: the parts of the step, as `actions.py` names them; the first begins with the step.
    """

    events: list[Event] = field(default_factory=list)
    before: int = 0
    peak: int = 0
    after: int = 0
    held: list[Held] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return sum(event.flops for event in self.events)

    def traffic(self) -> Traffic:
        """Return by axis and collective what the process sends."""
        traffic: Traffic = {}
        for event in self.events:
            if event.collective:
                count(event.collective, traffic)
        return traffic


class Recorder:
    """Records what a program, which has its memory already, does inside `with recorder:`; `restart` begins anew."""

    def __init__(self, program: Program) -> None:
        self.trace = Trace(marks=[Mark("begin", 0, 0, 0)])
        self._collectives = Collectives(program.mesh)
        self._blocks: dict[int, _Block] = {}  # by the identity of their storage
        self._count = 0
        self._live = 0
        self._phase: Phase = "update"
        self._mode = BelowDTensor(program, self._take)
        self._changes: list[tuple[_Block, int]] = []  # of memory since the trace began: a block, and by how much

    def __enter__(self) -> "Recorder":
        self._resized = _resizing(self._resize)
        self._resized.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._resized.__exit__(*error)

    def restart(self) -> None:
        """Begin a new trace, with what is held now."""
        self.trace = Trace(before=self._live, peak=self._live)
        self.mark("begin")
        self._changes = [(block, block.bytes) for block in self._blocks.values()]

    def mark(self, name: str) -> None:
        """Note that another part of the step begins."""
        self.trace.marks.append(Mark(name, len(self.trace.events), self._live, self._live))

    def finish(self) -> Trace:
        """Return the trace, with what was held at its peak told by who made it, largest first."""
        live: Counter[int] = Counter()
        total = 0
        for block, by in self._changes:
            live[block.number] += by
            total += by
            if total == self.trace.peak:
                break
        made = {block.number: block.call for block, _ in self._changes}
        parts: dict[tuple[str, str, Phase], list[int]] = {}
        for number, size in live.items():
            if size:
                parts.setdefault(made[number], []).append(size)
        held = [Held(*maker, sum(sizes), len(sizes)) for maker, sizes in parts.items()]
        self.trace.held = sorted(held, key=lambda part: -part.bytes)
        self.trace.after = self._live
        return self.trace

    def _take(self, call: Call, compute: Callable[[], Any]) -> Any:
        if call.phase != self._phase:
            self._phase = call.phase
            self.mark(call.phase)
        out = compute()
        if call.operator.startswith(IGNORED):
            return out
        given = list(tensors_in((call.inputs, tuple(call.named_inputs.values()))))
        made = list(tensors_in(out if isinstance(out, Tensor | list | tuple) else ()))
        reads = tuple(dict.fromkeys(self._number(x, call) for x in given))
        writes = tuple(dict.fromkeys(self._number(x, call) for x in [*made, *_changed(call)]))
        group = group_of(call.operator, call.function)
        if group == "views":
            return out
        cost = cost_of(call, out)
        shapes = tuple(tuple(x.shape) for x in [*given, *made])
        self.trace.events.append(
            Event(
                call.operator,
                call.module,
                call.phase,
                group,
                cost.dtype,
                cost.flops,
                cost.traffic,
                shapes,
                reads,
                writes,
                self._live,
                self._collectives.of(call.function, call.inputs),
            )
        )
        return out

    def _number(self, x: Tensor, call: Call) -> int:
        """Return the number of a tensor's memory block, which is counted as held from when it is first seen."""
        storage = x.untyped_storage()
        known = self._blocks.get(id(storage))
        if known is None:
            self._count += 1
            known = self._blocks[id(storage)] = _Block(self._count, 0, (call.module, call.operator, call.phase))
            weakref.finalize(storage, self._free, id(storage)).atexit = False
            self._grow(known, storage.nbytes())
        return known.number

    def _grow(self, block: "_Block", by: int) -> None:
        block.bytes += by
        self._live += by
        self._changes.append((block, by))
        if self._live > self.trace.peak:
            self.trace.peak = self._live
        last = self.trace.marks[-1]
        if self._live > last.peak:
            last.peak = self._live

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._grow(block, -block.bytes)

    def _resize(self, storage: Any, size: int) -> None:
        if known := self._blocks.get(id(storage)):
            self._grow(known, size - known.bytes)


@dataclass
class _Block:
    number: int
    bytes: int
    call: tuple[str, str, Phase]  # module, operator and phase of the call that was the first to have it


class BelowDTensor(Watch):
    """Watches what a process computes with its own parts of tensors, in all stages of a program that it holds."""

    def __init__(self, program: Program, around: Callable[..., Any]) -> None:
        super().__init__(program.models, around)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def _changed(call: Call) -> Iterator[Tensor]:
    """Yield the tensors that a call changes in place."""
    for place, name in enumerate(_arguments(call.function)):
        if name:
            yield from tensors_in(call.inputs[place] if place < len(call.inputs) else call.named_inputs.get(name))


@functools.cache
def _arguments(function: Any) -> tuple[str, ...]:
    """Return of each argument of an operator its name if it is changed, else ""."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        return ()
    if schema.name in FILLED:  # whose schemas do not say it
        return (schema.arguments[0].name,)
    changed = [argument.alias_info and argument.alias_info.is_write for argument in schema.arguments]
    return tuple(argument.name if is_so else "" for argument, is_so in zip(schema.arguments, changed, strict=True))


@contextmanager
def _resizing(tell: Callable[[Any, int], None]) -> Iterator[None]:
    """Hear of memory that is given back and taken again in place, as FSDP does with gathered weights."""
    real = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> Any:
        tell(storage, int(size))
        return real(storage, size)

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = real  # type: ignore[method-assign]
