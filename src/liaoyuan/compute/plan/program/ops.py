"""A trace as streams have it: what is computed and what travels, on which stream, and what each waits for.

As PyTorch issues it: one process computes in one stream in the order of the program. A message sets out when all that
was asked for before it has been computed (the stream of its group waits for the stream that computes), one after
another within a group, and whoever first reads what it brings waits for it. FSDP (torch 2.13, `_fsdp_param_group.py`)
adds up its reduced gradients on their own stream, packs the next unit's gradients when the last unit's are reduced,
and, where it is not told to gather early, gathers on streams of its own, of which each waits for the last unpacking.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from liaoyuan.compute.plan.program.trace import Event
from liaoyuan.compute.plan.program.work import Work, work_of
from liaoyuan.parallel.traffic import COUNTS, Collective

COMPUTE = "compute"
READ = "aten._local_scalar_dense"  # by which the host learns a number of the device
PACK_GATHER, UNPACK, PACK_GRADIENTS = "fsdp.all_gather_copy_in", "fsdp.split_with_sizes_copy", "fsdp.chunk_cat"
SHARDS = ("shard", "expert_shard", "dp")


@dataclass(frozen=True, slots=True)
class Op:
    """Something computed (`work`) or sent (`message`), or a piece of work on the stream of messages.

    gate: the number of what must have been computed before it sets out, -1: nothing. after: numbers of messages that
    it waits for. holds: whether the host waits for its end before it goes on.
    """

    name: str
    stream: str
    work: Work | None
    message: Collective | None
    gate: int
    after: tuple[int, ...]
    holds: bool


def ops_of(events: Sequence[Event], streams: bool, overlap: bool) -> tuple[list[Op], list[int]]:
    """Return what a process does, and how many ops there are before each event (and at the end).

    The sends and receives of a pipeline are left out: the schedule orders them.

    streams: whether its device has streams, beside which the host goes on. overlap: as in its layout.
    """
    reader = _Reader(streams, overlap)
    places = []
    for event in events:
        places.append(len(reader.ops))
        reader.read(event)
    return reader.ops, [*places, len(reader.ops)]


class _Reader:
    def __init__(self, streams: bool, overlap: bool) -> None:
        self.streams, self.overlap = streams, overlap
        self.ops: list[Op] = []
        self.bringing: dict[int, int] = {}  # block -> the message that writes it last
        self.taking: dict[int, int] = {}  # block -> the message that reads it last
        self.counting: set[int] = set()  # blocks of counts, which the host reads
        self.computed = -1  # number of what was last computed
        self.unpacked = -1  # number of FSDP's last unpacking since the step began
        self.reduced = -1  # number of FSDP's last reduction
        self.beside = -1  # number of the last op of the chain on the stream of messages, if one is being made
        self.hop = -1  # number of the last message between neighbours

    def read(self, event: Event) -> None:
        """Take the next event."""
        collective = event.collective
        if event.operator.startswith("c10d.recv"):
            if self.hop >= 0:
                self.bringing.update(dict.fromkeys(event.writes, self.hop))
        elif collective is None:
            self._compute(event)
        elif collective.axis != "pp":
            self._send(event, collective)

    def _compute(self, event: Event) -> None:
        if self.streams and event.operator == PACK_GATHER and not self.overlap:
            self._add(Op(event.operator, "shard", work_of(event), None, self._early(), (), False))
            self.bringing.update(dict.fromkeys(event.writes, len(self.ops) - 1))
            return
        after = self._awaited(event)
        if self.streams and self.beside >= 0 and self.beside in after:
            stream = self.ops[self.beside].stream
            self._add(Op(event.operator, stream, work_of(event), None, self.computed, after, False))
            self.beside = len(self.ops) - 1
            self.bringing.update(dict.fromkeys(event.writes, self.beside))
            return
        self.beside = -1
        if event.operator == PACK_GRADIENTS and self.reduced >= 0:
            after = tuple({*after, self.reduced})
        holds = event.operator == READ or any(block in self.counting for block in event.reads)
        name = f"{event.phase} {event.module}: {event.operator}" if event.module else f"{event.phase} {event.operator}"
        self._add(Op(name, COMPUTE, work_of(event), None, -1, after, holds))
        self.computed = len(self.ops) - 1
        if event.operator == UNPACK:
            self.unpacked = self.computed
        for block in event.writes:
            self.bringing.pop(block, None)
            self.counting.discard(block)

    def _send(self, event: Event, collective: Collective) -> None:
        number = len(self.ops)
        is_sharded = collective.axis in SHARDS
        early = self.streams and not self.overlap and is_sharded and collective.kind == "all-gather"
        gate = self._early() if early else self.computed
        name = f"{collective.axis}: {collective.kind}"
        self._add(Op(name, collective.axis, None, collective, gate, self._awaited(event), False))
        if collective.kind == "send":
            self.hop = number
        else:
            self.bringing.update(dict.fromkeys(event.writes, number))
        self.taking.update(dict.fromkeys(event.reads, number))
        self.beside = number if is_sharded and collective.kind in ("reduce-scatter", "all-reduce") else -1
        if is_sharded and collective.kind == "reduce-scatter":
            self.reduced = number
        if collective.kind == COUNTS:
            self.counting.update(event.writes)

    def _early(self) -> int:
        return self.unpacked if self.unpacked >= 0 else self.computed

    def _awaited(self, event: Event) -> tuple[int, ...]:
        """Return the messages that bring what is read or written here, or still read what is written here."""
        found = {self.bringing[block] for block in (*event.reads, *event.writes) if block in self.bringing}
        found |= {self.taking.pop(block) for block in event.writes if block in self.taking and not event.collective}
        return tuple(sorted(found))

    def _add(self, op: Op) -> None:
        self.ops.append(op)
