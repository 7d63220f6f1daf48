"""A process's step as streams play it: what it computes, what travels meanwhile, and where one waits for the other.

Nothing is assumed of overlap: the host asks for one thing after another, each stream does in order what it is asked
for, and a message shares the levels of the network with those that are under way at the same time, max-min fairly
(Bertsekas and Gallager 1992, "Data networks", sec. 6.5.2). While messages travel, computing is slower by the profile's
`contention`.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from liaoyuan.compute.plan.machine.fabric import Transfer
from liaoyuan.compute.plan.program.ops import COMPUTE, Op
from liaoyuan.compute.plan.step.prices import Prices
from liaoyuan.compute.plan.step.step_time import Bar

LAUNCH = "launch"
INSTANT = 1e-13  # seconds, for each second that has passed: what is nearer than that is now
Loads = tuple[tuple[str, float], ...]


@dataclass
class Timeline:
    """What has happened until `seconds`: busy seconds of each stream, seconds in which computing waited by what for."""

    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    exposed: dict[str, float] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)  # of each op


def play(ops: Sequence[Op], prices: Prices, details: bool = False, marks: Sequence[int] = ()) -> list[Timeline]:
    """Return what has happened until each of `marks` (numbers of ops, rising; computing alone), and until the end.

    details: with bars.
    """
    return _Player(ops, prices, details).play(marks)


class _Player:
    def __init__(self, ops: Sequence[Op], prices: Prices, details: bool) -> None:
        self.ops, self.prices, self.details = ops, prices, details
        self.network = _Network(len(ops))
        self.gated: dict[int, list[int]] = {}
        for number, op in enumerate(ops):
            if op.stream != COMPUTE:
                self.gated.setdefault(op.gate, []).append(number)
        self.host = self.computed = self.computing = 0.0
        self.exposed: dict[str, float] = {}
        self.bars: list[Bar] = []

    def play(self, marks: Sequence[int]) -> list[Timeline]:
        found, rest = list[Timeline](), deque(marks)
        self._release(-1, -1)
        for number, op in enumerate(self.ops):
            while rest and rest[0] <= number:
                rest.popleft()
                found.append(self._until(self.computed))
            if op.stream == COMPUTE:
                self._compute(number, op)
            elif not self.prices.streams:  # it is the one who computes that asks
                asking = max(self.prices.asking, self.prices.launch)
                self.computed = self._idle(self.computed + asking, LAUNCH)
                if op.message is not None:
                    more = max(0.0, self.prices.carried(op.message) - asking)
                    self.computed = self._idle(self.computed + more, op.stream)
                self.host = self.computed
            else:
                self.host += self.prices.launch
        found += [self._until(self.computed) for _ in rest]
        end, last = self.network.drain()
        if end > self.computed:
            self.computed = self._idle(end, self.ops[last].stream)
        return [*found, self._until(self.computed)]

    def _compute(self, number: int, op: Op) -> None:
        prices, network = self.prices, self.network
        asked = (self.host if prices.streams else self.computed) + prices.launch
        self.host = asked
        if op.after:
            for message in op.after:
                network.wait_for(message)
            last = max(op.after, key=network.ends.__getitem__)
            if network.ends[last] > self.computed:
                self.computed = self._idle(network.ends[last], self.ops[last].stream)
        if not prices.streams:
            asked = self.computed + prices.launch
        if asked > self.computed:
            self.computed = self._idle(asked, LAUNCH)
        begin = self.computed
        assert op.work is not None
        self.computed = network.compute(begin, prices.work(op.work), prices.contention)
        self.computing += self.computed - begin
        network.ends[number] = self.computed
        if self.details:
            self.bars.append(Bar(COMPUTE, begin, self.computed, op.name))
        if op.holds or not prices.streams:
            self.host = self.computed
        if number in self.gated:
            self._release(number, number)

    def _idle(self, until: float, reason: str) -> float:
        if until > self.computed:
            self.exposed[reason] = self.exposed.get(reason, 0.0) + until - self.computed
        return max(until, self.computed)

    def _release(self, gate: int, number: int) -> None:
        """Let go what waits for an op that is done, as soon as the host has asked for it."""
        for follower in self.gated.get(gate, ()):
            op = self.ops[follower]
            asked = self.host + (follower - number) * self.prices.launch
            if op.message is not None:
                transfer = self.prices.message(op.message)
            else:
                assert op.work is not None
                transfer = Transfer(self.prices.work(op.work), ())
            self.network.submit(follower, op.stream, max(asked, self.computed), op.after, transfer)

    def _until(self, end: float) -> Timeline:
        network = self.network
        bars = self.bars + [Bar(stream, begin, end, self.ops[n].name) for stream, begin, end, n in network.bars]
        busy = {COMPUTE: self.computing, **network.busy}
        return Timeline(end, busy, dict(self.exposed), bars if self.details else [], list(network.ends))


@dataclass(slots=True)
class _Message:
    """Under way: seconds of latency still to pass, and then the share of its bytes that is still to be sent."""

    number: int
    stream: str
    begun: float
    latency: float
    loads: Loads
    left: float = 1.0


class _Network:
    """The messages of a process and of its sisters, who send the same at the same time."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.ends = [math.nan] * count
        self.moving: list[_Message] = []
        self.queues: dict[str, deque[tuple[int, float, tuple[int, ...], Transfer]]] = {}
        self.busy: dict[str, float] = {}
        self.bars: list[tuple[str, float, float, int]] = []
        self.last = -1
        self._rates: tuple[float, ...] = ()

    def submit(self, number: int, stream: str, asked: float, after: tuple[int, ...], transfer: Transfer) -> None:
        """Put a message at the end of its stream; it sets out not before `asked`, nor before those of `after` end."""
        self.queues.setdefault(stream, deque()).append((number, asked, after, transfer))
        if asked <= self.now:
            self._start()

    def wait_for(self, number: int) -> None:
        """Go on until a message has arrived."""
        while self.ends[number] != self.ends[number]:
            following = self._next()
            assert following < math.inf, "a message is waited for that never sets out"
            self._go(following)

    def compute(self, begin: float, work: float, contention: float) -> float:
        """Return when so many seconds of work end that begin now; they take longer while messages travel."""
        self._go(begin)
        if not self.moving and not any(self.queues.values()):
            self.now = max(self.now, begin + work)
            return begin + work
        now = begin
        while True:
            slower = contention if self.moving else 1.0
            following = self._next()
            if now + work * slower <= following:
                self._go(now + work * slower)
                return now + work * slower
            work -= (following - now) / slower
            now = following
            self._go(following)

    def drain(self) -> tuple[float, int]:
        """Go on until everything has arrived; return when, and what was the last."""
        while (following := self._next()) < math.inf:
            self._go(following)
        return (self.ends[self.last], self.last) if self.last >= 0 else (0.0, -1)

    def _next(self) -> float:
        """Return when next a message starts, ends its latency, or arrives."""
        found = math.inf
        for message, rate in zip(self.moving, self._rates, strict=True):
            lasting = message.latency or (message.left / rate if rate else 0.0)
            found = min(found, self.now + lasting)
        streams = {message.stream for message in self.moving}
        for stream, queue in self.queues.items():
            if queue and stream not in streams and self._free(queue[0][2]):
                found = min(found, max(self.now, queue[0][1]))
        return found

    def _free(self, after: tuple[int, ...]) -> bool:
        return all(self.ends[number] == self.ends[number] for number in after)

    def _go(self, until: float) -> None:
        """Let messages travel until then; whatever starts or ends on the way does so exactly."""
        while True:
            if not self.moving and not any(self.queues.values()):
                self.now = max(self.now, until)
                return
            following = self._next()
            step = min(until, following) - self.now
            if step > 0:
                self._travel(step)
            if following > until:
                return
            self._finish()
            self._start()

    def _travel(self, step: float) -> None:
        self.now += step
        for message, rate in zip(self.moving, self._rates, strict=True):
            if message.latency > 0:
                message.latency = max(0.0, message.latency - step)
            elif rate:
                message.left -= step * rate

    def _finish(self) -> None:
        instant = INSTANT * (1.0 + self.now)
        for message, rate in zip(tuple(self.moving), self._rates, strict=True):
            if message.latency <= instant:
                message.latency = 0.0
            if message.latency or (message.loads and message.left > instant * rate):
                continue
            self.moving.remove(message)
            self.ends[message.number] = self.now
            self.last = message.number
            self.busy[message.stream] = self.busy.get(message.stream, 0.0) + self.now - message.begun
            self.bars.append((message.stream, message.begun, self.now, message.number))
        self._share()

    def _start(self) -> None:
        streams = {message.stream for message in self.moving}
        for stream, queue in self.queues.items():
            if queue and stream not in streams and queue[0][1] <= self.now and self._free(queue[0][2]):
                number, _, _, transfer = queue.popleft()
                loads = tuple(pair for pair in transfer.loads if pair[1] > 0)
                self.moving.append(_Message(number, stream, self.now, transfer.latency, loads))
        self._share()

    def _share(self) -> None:
        loads = tuple(message.loads if message.latency <= 0 else () for message in self.moving)
        self._rates = shares(loads)


@lru_cache(maxsize=4096)
def shares(loads: tuple[Loads, ...]) -> tuple[float, ...]:
    """Return for each message which part of it is sent in a second, max-min fairly; 0 if it loads nothing.

    loads: of each, by level the seconds that it needs there alone. All grow alike, relative to what each can do alone,
    until a level is full; those that cross it stay as they are, and the others go on growing.
    """
    alone = [max((load for _, load in one), default=0.0) for one in loads]
    rates, growing = [0.0] * len(loads), {number for number, most in enumerate(alone) if most > 0}
    room: dict[str, float] = {level: 1.0 for one in loads for level, _ in one}
    reached = 0.0
    while growing:
        demand = dict.fromkeys(room, 0.0)
        for number in growing:
            for level, load in loads[number]:
                demand[level] += load / alone[number]
        step = min(room[level] / wanted for level, wanted in demand.items() if wanted > 0)
        reached += step
        full = set[str]()
        for level, wanted in demand.items():
            room[level] -= step * wanted
            if wanted > 0 and room[level] <= 1e-12:
                full.add(level)
        for number in [n for n in growing if any(level in full for level, _ in loads[n])]:
            rates[number] = reached / alone[number]
            growing.discard(number)
    return tuple(rates)
