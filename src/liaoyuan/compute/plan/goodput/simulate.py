"""Many lives of one job among failures, all at once: an array has a value for each life.

A life is a chain of stretches, each ended by a failure, a planned stop, or the end of the work. Within a stretch
nothing is random, so where the job stands after any time follows in closed form and no step is walked through: 60 days
cost as much as there are failures in them.

Failures come whatever the job does, also while it is down. Then the way back begins again.

Work is counted in steps. Between two durable saves there are `every` steps, then a part of the save that the training
waits for (`block`); the rest of it (`write`) goes on beside the next steps, which are `slow` times as long meanwhile.
A state counts when it is written. A local save every `local_every` steps counts at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from liaoyuan.compute.plan.machine.recovery import Kind
from liaoyuan.compute.plan.span import Floats
from liaoyuan.rundir import Progress, Report, silent

LOSSES = ("detection", "waiting for nodes", "restart", "lost work", "saving", "stragglers", "planned stops")
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]
TOLD = 16  # failures between two reports of progress
PACKED = 0.9  # arrays are packed when fewer than so many of their lives go on


@dataclass(frozen=True)
class Costs:
    """What a job meets. Arrays of one value for each life; seconds where nothing else is said.

    steps: to do, each of `step` seconds without stragglers, times `stretch` with them. mean: between failures, all
    nodes together (inf: none); stop_mean: between planned stops. start: processes, rendezvous, first step; then
    `load`, or `load_local` where the local copies are used. spares: nodes. detect: [lives, kinds].
    """

    steps: Floats
    step: Floats
    stretch: Floats
    every: Floats
    block: Floats
    write: Floats
    slow: Floats
    local_every: Floats  # 0: no local saves
    local_block: Floats
    mean: Floats
    stop_mean: Floats
    stop: Floats
    detect: Floats
    start: Floats
    load: Floats
    load_local: Floats
    swap: Floats
    requeue: Floats
    repair: Floats
    spares: Floats

    @property
    def lives(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Chance:
    """What falls to each life at its next failure: the gap to it in units of the mean, which kind it is (uniform),
    the time of repair and of silent corruption in units of theirs.
    """

    gap: Floats
    kind: Floats
    repair: Floats
    unnoticed: Floats


Chances = Callable[[int], Chance]  # of the failure with this number, from 0


def chances(seed: int, lives: int, copies: int = 1, shape: float = 1.0) -> Chances:
    """Return random numbers that depend on seed, failure and life alone: common ones for whatever is compared.

    copies: how many variants are lived through side by side; the lives of each get the same numbers.
    """
    scale = math.gamma(1 + 1 / shape)

    def draw(number: int) -> Chance:
        numbers = np.random.default_rng([seed, number])
        gap, repair, unnoticed = numbers.standard_exponential((3, lives))
        kind = numbers.random(lives)
        gap = gap if shape == 1 else gap ** (1 / shape) / scale
        return Chance(*(np.tile(part, copies) if copies > 1 else part for part in (gap, kind, repair, unnoticed)))

    return draw


@dataclass(frozen=True)
class Lives:
    """How they went, a value for each.

    seconds: from the first step to the last save. useful: of these, in steps that were kept, without stragglers.
    losses: [LOSSES, lives] seconds, which with `useful` add up to `seconds`. waits: failures for which no spare was at
    hand. finished: False where the job had not ended at the horizon; `useful` is then what it had kept.
    """

    seconds: Floats
    useful: Floats
    losses: Floats
    failures: Floats
    waits: Floats
    finished: Floats

    @property
    def ettr(self) -> Floats:
        """Effective training time ratio: time in steps that were kept, slow ones too, of all time."""
        stragglers = self.losses[LOSSES.index("stragglers")]
        return np.asarray((self.useful + stragglers) / self.seconds)

    @property
    def goodput(self) -> Floats:
        """Share of the time that the job would have needed if nothing had ever failed, been saved or been slow."""
        return np.asarray(self.useful / self.seconds)


def simulate(
    costs: Costs,
    kinds: tuple[Kind, ...],
    chance: Chances,
    horizon: Floats,
    survives: bool = False,
    report: Report = silent,
) -> Lives:
    """Live all lives to their end, or to the first failure past `horizon` seconds.

    survives: whether local copies outlive the node on which they were made.
    """
    total, table, number = costs.lives, _Kinds.of(kinds), 0
    result = Lives(np.zeros(total), np.zeros(total), np.zeros((len(LOSSES), total)), *np.zeros((3, total)))
    alive, going = np.arange(total), np.ones(total, bool)
    state, line = _State.fresh(costs), _Line.of(costs)
    while going.any():
        drawn = chance(number)
        ended = _stretch(costs, line, state, drawn if len(alive) == total else _taken(drawn, alive), table, survives)
        over = (ended | (state.time > horizon)) & going
        if over.any():
            _note(result, alive[over], ended[over], _taken(state, over), _taken(costs, over))
            going &= ~over
        if number % TOLD == 0 or not going.any():
            left = float(np.sum(1 - state.at[going] / costs.steps[going]))
            report(Progress(total - math.ceil(left), total, "life"))
        if going.sum() < PACKED * len(going):
            alive, horizon = alive[going], horizon[going]
            state, costs, line = _taken(state, going), _taken(costs, going), _taken(line, going)
            going = going[going]
        number += 1
    return result


@dataclass(frozen=True)
class _Line:
    """What follows from the costs. rate: of interruptions, `planned` of which are stops.

    pace: seconds of a step, with stragglers and the share of local saves that falls on it. run: seconds of the steps
    between two durable saves, which wait for the first to be written; cycle: and of the second save.
    """

    rate: Floats
    planned: Floats
    pace: Floats
    run: Floats
    cycle: Floats

    @classmethod
    def of(cls, costs: Costs) -> "_Line":
        stops = 1 / costs.stop_mean
        rate = stops + 1 / costs.mean
        local = np.divide(costs.local_block, costs.local_every, out=np.zeros_like(rate), where=costs.local_every > 0)
        pace = costs.step * costs.stretch + local
        run = _beside_a_save(costs, pace, costs.every)
        return cls(rate, stops / np.maximum(rate, 1e-300), pace, run, run + costs.block)


@dataclass(frozen=True)
class _Kinds:
    """Of each kind: the share of it and those before, whether a node is lost, seconds unnoticed."""

    share: Floats
    loses: Flags
    unnoticed: Floats

    @classmethod
    def of(cls, kinds: tuple[Kind, ...]) -> "_Kinds":
        shares = np.cumsum([kind.share for kind in kinds])
        unnoticed = np.array([kind.unnoticed_hours * 3600 for kind in kinds])
        return cls(shares / shares[-1], np.array([kind.loses_node for kind in kinds]), unnoticed)


@dataclass
class _State:
    """Where each life stands when a stretch begins.

    at: step from which it goes on; durable: the newest durable state. detect, stop, wait, restart: what lies before it
    goes on, in this order; nodes_at: when all its nodes are there. ready: [lives, slots], when spare nodes are free,
    the first ones first.
    """

    time: Floats
    at: Floats
    durable: Floats
    detect: Floats
    stop: Floats
    wait: Floats
    restart: Floats
    nodes_at: Floats
    failures: Floats
    waits: Floats
    losses: Floats  # [lives, LOSSES]
    ready: Floats

    @classmethod
    def fresh(cls, costs: Costs) -> "_State":
        slots = np.arange(max(1, int(costs.spares.max())))
        ready = np.where(slots < costs.spares[:, None], 0.0, np.inf)
        zeros = {field.name: np.zeros(costs.lives) for field in fields(cls)}
        return cls(**(zeros | {"losses": np.zeros((costs.lives, len(LOSSES))), "ready": ready}))

    def lose(self, name: str, seconds: Floats) -> None:
        self.losses[:, LOSSES.index(name)] += seconds


Arrays = TypeVar("Arrays", Costs, Chance, _State, _Line)


def _taken(arrays: Arrays, which: Flags | Indices) -> Arrays:
    return type(arrays)(*(getattr(arrays, field.name)[which] for field in fields(arrays)))


def _stretch(costs: Costs, line: _Line, state: _State, drawn: Chance, kinds: _Kinds, survives: bool) -> Flags:
    """Live to the next failure, stop or end; return which have come to the end."""
    gap = np.divide(drawn.gap, line.rate, out=np.full_like(line.rate, np.inf), where=line.rate > 0)
    down = state.detect + state.stop + state.wait + state.restart
    first = np.minimum((np.floor(state.at / costs.every) + 1) * costs.every, costs.steps)  # the next durable save
    needed = _to_the_end(costs, line, state.at, first)
    ends = gap - down >= needed
    span = np.clip(gap - down, 0, needed)
    work, durable, local = _after(costs, line, state, first, span)
    work, durable = np.where(ends, costs.steps, work), np.where(ends, costs.steps, durable)
    _count_down(state, gap)
    state.lose("saving", span - (work - state.at) * costs.step * costs.stretch)
    state.time = state.time + np.where(ends, down + needed, gap)
    _fail(costs, line, state, drawn, kinds, _Reached(work, durable, local), ~ends, survives)
    return np.asarray(ends)


def _count_down(state: _State, gap: Floats) -> None:
    """Count what passes of the way back before the next failure."""
    left = gap
    parts = {
        "detection": state.detect,
        "planned stops": state.stop,
        "waiting for nodes": state.wait,
        "restart": state.restart,
    }
    for name, part in parts.items():
        passed = np.minimum(left, part)
        state.lose(name, passed)
        left = left - passed


def _beside_a_save(costs: Costs, pace: Floats, steps: Floats) -> Floats:
    """Return the seconds of `steps` steps beside which a save is written, which is over then."""
    seconds = steps * pace
    slowed = seconds + costs.write * (1 - 1 / costs.slow)
    return np.where(seconds * costs.slow <= costs.write, costs.write, slowed)


def _to_the_end(costs: Costs, line: _Line, at: Floats, first: Floats) -> Floats:
    """Return the seconds from step `at`, after which `first` is saved next, until the last state is written."""
    whole = np.floor((costs.steps - first) / costs.every)
    rest = costs.steps - first - whole * costs.every
    tail = np.where(rest > 0, _beside_a_save(costs, line.pace, rest) + costs.block, 0.0)
    return (first - at) * line.pace + costs.block + whole * line.cycle + tail + costs.write


def _after(costs: Costs, line: _Line, state: "_State", first: Floats, span: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the work done, the newest durable and the newest local state, `span` seconds after a life has gone on."""
    pace, cycle = line.pace, line.cycle
    late = span - (first - state.at) * pace - costs.block  # since the first save was handed over
    whole = np.floor(np.maximum(late, 0) / cycle)
    within = np.maximum(late, 0) - whole * cycle
    slowed = np.minimum(within, costs.write) / costs.slow + np.maximum(within - costs.write, 0)
    since = np.minimum(slowed / pace, costs.every)
    saved = first + whole * costs.every
    work = np.where(late < 0, np.minimum(state.at + span / pace, first), np.minimum(saved + since, costs.steps))
    before = np.where(whole > 0, saved - costs.every, state.durable)
    durable = np.where(late < 0, state.durable, np.where(within >= costs.write, saved, before))
    copied = np.where(late < 0, state.at, np.minimum(saved, costs.steps))
    whole_local = np.floor(work / np.maximum(costs.local_every, 1)) * costs.local_every
    local = np.where(costs.local_every > 0, np.maximum(copied, whole_local), durable)
    return work, durable, local


@dataclass(frozen=True)
class _Reached:
    """How far the steps are at the end of a stretch, and which states there are."""

    work: Floats
    durable: Floats
    local: Floats


def _fail(
    costs: Costs,
    line: _Line,
    state: _State,
    drawn: Chance,
    kinds: _Kinds,
    reached: _Reached,
    fails: Flags,
    survives: bool,
) -> None:
    """Set the state to what lies behind a failure or planned stop that has come now to those of `fails`."""
    work = reached.work
    planned = (drawn.kind < line.planned) | ~fails
    uniform = (drawn.kind - line.planned) / np.maximum(1 - line.planned, 1e-300)
    kind = np.minimum(np.searchsorted(kinds.share, uniform, side="right"), len(kinds.share) - 1)
    loses = kinds.loses[kind] & ~planned
    wrong = np.where(planned, 0.0, kinds.unnoticed[kind] * drawn.unnoticed)  # seconds
    stays = (costs.local_every > 0) & ~planned & (wrong == 0) & (survives | ~loses)
    sound = np.floor(np.maximum(work - wrong / line.pace, 0) / costs.every) * costs.every
    durable = np.where(wrong > 0, np.minimum(reached.durable, sound), reached.durable)
    durable = np.where(planned & (work > state.at), np.floor(work), durable)
    state.at = np.where(stays, reached.local, np.where(planned & (work <= state.at), state.at, durable))
    state.durable = durable
    state.lose("lost work", (work - state.at) * costs.step * costs.stretch)
    state.failures = state.failures + ~planned
    state.detect = np.where(planned, 0.0, costs.detect[np.arange(len(kind)), kind])
    state.stop = np.where(planned, costs.stop + costs.block + costs.write, 0.0)
    _find_nodes(costs, state, drawn, loses)
    state.restart = costs.start + np.where(stays, costs.load_local, costs.load)


def _find_nodes(costs: Costs, state: _State, drawn: Chance, loses: Flags) -> None:
    """Take a spare for each node that is lost, or wait for the first of: a repaired one, another of the scheduler's.

    One that the scheduler lends is given back when the next one is repaired, so that the pool is whole again.
    """
    known = state.time + state.detect + state.stop
    repaired = known + costs.repair * drawn.repair
    found = np.minimum(np.minimum(state.ready[:, 0], repaired), known + costs.requeue)
    state.waits = state.waits + (loses & (found > known))
    there = np.where(loses, np.maximum(found, known) + costs.swap, 0.0)
    state.nodes_at = np.maximum(state.nodes_at, there)
    state.wait = np.maximum(state.nodes_at - known, 0.0)
    # The repaired one takes its place in the order, and the first one is gone.
    later = np.concatenate([state.ready[:, 1:], np.full((len(known), 1), np.inf)], axis=1)
    moved = np.maximum(state.ready, np.minimum(repaired[:, None], later))
    state.ready = np.where(loses[:, None], moved, state.ready)


def _note(result: Lives, lives: Indices, ended: Flags, state: _State, costs: Costs) -> None:
    """Write down the lives that are over."""
    useful = state.at * costs.step
    state.lose("stragglers", useful * (costs.stretch - 1))
    result.seconds[lives] = state.time
    result.useful[lives] = useful
    result.losses[:, lives] = state.losses.T
    result.failures[lives], result.waits[lives], result.finished[lives] = state.failures, state.waits, ended
