"""The step of a whole job, from samples of small ones: seconds by any profile, and what each process holds.

Without a pipeline the sample is played as one sequence and extended by layers and microbatches. With one, each action
of each stage is played by itself, and the schedule's actions flow through all processes; gathers go before them, the
reduction of gradients and the optimiser after.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.actions import FORWARD, MICROBATCH, OPTIMISER, REDUCE, WEIGHT, Action, orders
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.program.layers import SPLIT, Block, Part, Sample, Samples, Sketch, Values, extended
from liaoyuan.compute.plan.program.ops import COMPUTE
from liaoyuan.compute.plan.step.flow import Flow, flow
from liaoyuan.compute.plan.step.prices import Prices, crowd, full
from liaoyuan.compute.plan.step.step_time import Bar
from liaoyuan.compute.plan.step.timeline import Timeline, play
from liaoyuan.parallel.pipeline import stage_numbers
from liaoyuan.parallel.traffic import Sent

SECONDS, COMPUTING, EXPOSED = "seconds", "computing", "exposed "
BUBBLE, PIPELINE = "bubble", "pp"
HANDED = ("calls pp send", "bytes pp send")


@dataclass
class Step:
    """Seconds of a step, of which a card computes, and waits for what: the mean over the processes of a pipeline.

    bars: of a pipeline's actions, or of the sample's streams. begins: without a pipeline, when each part of the sample
    begins in a step with all layers; flow: with one.
    """

    seconds: float
    computing: float
    exposed: dict[str, float]
    bars: list[Bar] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)
    flow: Flow | None = None


@dataclass(frozen=True)
class Load:
    """What process `rank` holds at most and between steps (bytes), and computes and sends in a step.

    moments: what it holds as the step goes on, in order: name of the part of the step, bytes at its begin, at most, and
    at its end.
    """

    rank: int
    place: str
    peak: float
    lasting: float
    flops: float
    traffic: float
    sent: dict[str, Sent]
    moments: tuple[tuple[str, float, float, float], ...]
    sample: Sample


class Whole:
    """A job, told from its samples."""

    def __init__(self, sketch: Sketch, samples: Samples, cluster: Cluster) -> None:
        self.sketch, self.samples, self.cluster = sketch, samples, cluster
        self.job: Job = sketch.job
        self.layout = sketch.job.resolved
        self.microbatches = self.job.train.microbatches

    def step(self, profile: DeviceProfile, details: bool = False) -> Step:
        """Return a step by a profile whose figures are certain."""
        return self._piped(profile, details) if self.layout.pp > 1 else self._plain(profile, details)

    def loads(self) -> list[Load]:
        """Return what each kind of process holds: one, or of a pipeline the first, the fullest between, the last."""
        if self.layout.pp == 1:
            return [self._plain_load()]
        found = self._piped_loads
        middle = sorted(found[1:-1], key=lambda load: -load.peak)[:1]
        return [found[0], *middle, found[-1]]

    def more_of(self, number: int) -> list[float]:
        """Return how many blocks of each kind each stage of process `number` has beyond the samples', on the mean."""
        if self.layout.pp == 1:
            return self._more[0]
        own = stage_numbers(self.layout, number // (self.job.processes // self.layout.pp))
        counts = sum((self.sketch.stages[stage] for stage in own), Counter[Block]())
        return self.sketch.more(counts, len(own))

    @property
    def executed(self) -> float:
        """FLOPs of matrix products of a step, the mean over all processes."""
        loads = [self._plain_load()] if self.layout.pp == 1 else self._piped_loads
        return sum(load.flops for load in loads) / len(loads)

    # Without a pipeline

    def _plain(self, profile: DeviceProfile, details: bool) -> Step:
        prices = Prices.of(self.job, self.cluster, profile)
        played = [self._played(sample, prices, details) for sample in self._variants]
        ends = [self._with_microbatches(lines) for lines in played]
        step = _step(extended(ends[0], ends[0], ends[1:], self._more[0]), played[0][-1].bars)
        begins = [{str(number): line.seconds for number, line in enumerate(lines)} for lines in played]
        step.begins = list(extended(begins[0], begins[0], begins[1:], self._more[0]).values())
        return step

    def _played(self, sample: Sample, prices: Prices, details: bool) -> list[Timeline]:
        """Return what has happened until each part of a sample, and until the end."""
        ops = [op for part in sample.parts for op in part.ops]
        counts = [len(part.ops) for part in sample.parts]
        return play(ops, prices, details, [sum(counts[:number]) for number in range(len(counts))])

    def _with_microbatches(self, lines: Sequence[Timeline]) -> Values:
        """Return what has happened in the end, with all microbatches that there are."""
        values, middle = _values(lines[-1]), self.middle
        if middle:
            before, after = _values(lines[middle.start]), _values(lines[middle.stop])
            for key in after:
                values[key] = values.get(key, 0.0) + self.times * (after[key] - before.get(key, 0.0))
        return values

    @cached_property
    def middle(self) -> range | None:
        """The parts of the sample's microbatch that stands for those that it does not have (None: it has all)."""
        places = [number for number, part in enumerate(self.samples.base[0].parts) if part.name == MICROBATCH]
        return range(places[0], places[1]) if len(places) >= 3 and self.times else None

    @property
    def times(self) -> int:
        """How many microbatches the small job does not have."""
        return self.microbatches - self.sketch.small.train.microbatches

    @cached_property
    def _batches(self) -> int:
        """Bytes of the microbatches that the small job does not have."""
        count = self.job.rows // (self.layout.dp * self.layout.fsdp) // self.microbatches
        each = (
            count * self.job.sequence_length * (8 + 8 + 4) + (count + 1) * 4
        )  # tokens, positions, weights; boundaries
        return each * self.times

    def _plain_load(self) -> Load:
        base, *more = ([_held(part, self._batches) for part in sample.parts] for sample in self._variants)
        moments = []
        for number, held in enumerate(base):
            values = extended(held, held, [other[number] for other in more], self._more[0])
            moments.append((self.samples.base[0].parts[number].name, values["live"], values["peak"], values["after"]))
        counts = [self._counted(sample) for sample in self._variants]
        values = extended(counts[0], counts[0], counts[1:], self._more[0])
        peak = max(most for _, _, most, _ in moments)
        return _load(0, "every process", peak, moments[-1][3], values, tuple(moments), self.samples.base[0])

    def _counted(self, sample: Sample) -> Values:
        """Return the counts of a whole step with all its microbatches."""
        total, middle = dict[str, float](), self.middle or range(0)
        for number, part in enumerate(sample.parts):
            times = 1 + self.times * (number in middle)
            for key, value in part.counts.items():
                total[key] = total.get(key, 0.0) + times * value
        return total

    @cached_property
    def _variants(self) -> tuple[Sample, ...]:
        return (self.samples.base[0], *self.samples.more)

    # With a pipeline

    @cached_property
    def _more(self) -> list[list[float]]:
        """How many blocks of each kind each stage has beyond the base."""
        return [self.sketch.more(counts) for counts in self.sketch.stages]

    def _piped(self, profile: DeviceProfile, details: bool) -> Step:
        each = self.job.processes // self.layout.pp
        cores = self.cluster.per_node if crowd(self.job, self.cluster) > 1 else float("inf")
        fabric = Fabric(self.cluster, profile)
        shared, taken = max(1.0, each / cores), full(self.job, self.cluster)
        prices = Prices(profile, fabric, self.job.device != "cpu", shared, self.job.processes, taken)
        costs = _Costs(self, lambda part: _values(play(part.ops, prices)[-1]))
        order = orders(self.layout, self.microbatches)
        handed = self._handed

        def travel(sender: int, receiver: int) -> float:
            return fabric.transfer("send", handed, (sender * each, receiver * each)).seconds

        begins = [costs.part(rank, "begin") for rank in range(self.layout.pp)]
        flowed = flow(
            order,
            lambda action, is_first: costs.action(action, is_first)[SECONDS],
            travel,
            self.layout.stages,
            max(1.0, cores / each),
            [values[SECONDS] for values in begins],
        )
        ends = [costs.part(rank, REDUCE) for rank in range(self.layout.pp)]
        updates = [costs.part(rank, OPTIMISER) for rank in range(self.layout.pp)]
        reduced = [flowed.ends[rank][-1] + ends[rank][SECONDS] for rank in range(self.layout.pp)]
        seconds = max(reduced) + max(values[SECONDS] for values in updates)
        total = dict[str, float]()
        for rank in range(self.layout.pp):
            seen = set[tuple[str, int]]()
            values = [begins[rank], ends[rank], updates[rank]]
            for action in order[rank]:
                values.append(costs.action(action, (action.kind, action.stage) not in seen))
                seen.add((action.kind, action.stage))
            for one in values:
                for key, value in one.items():
                    total[key] = total.get(key, 0.0) + value / self.layout.pp
            own = sum(one[SECONDS] for one in values) + flowed.travel[rank]
            waited = {PIPELINE: flowed.travel[rank], BUBBLE: max(0.0, seconds - own)}
            for name, value in waited.items():
                total[EXPOSED + name] = total.get(EXPOSED + name, 0.0) + value / self.layout.pp
        total[SECONDS] = seconds
        return _step(total, _bars(order, flowed) if details else [], flowed)

    @cached_property
    def _handed(self) -> int:
        return max(part.handed for sample in self.samples.base for part in sample.parts if part.action)

    @cached_property
    def _piped_loads(self) -> list[Load]:
        return [self._piped_load(rank) for rank in range(self.layout.pp)]

    def _piped_load(self, rank: int) -> Load:
        held, counts = _Costs(self, _held_change), _Costs(self, lambda part: part.counts)
        lasting = held.lasting(rank) + self._batches + self._arriving(rank) + self._left(rank)
        begin, reduce, update = (held.part(rank, name) for name in ("begin", REDUCE, OPTIMISER))
        live, moments, total = lasting, list[tuple[str, float, float, float]](), dict[str, float]()
        seen = set[tuple[str, int]]()

        def take(name: str, change: Values, counted: Values) -> None:
            nonlocal live
            moments.append((name, live, live + change["rise"], live + change["change"]))
            live += change["change"]
            for key, value in counted.items():
                total[key] = total.get(key, 0.0) + value

        take("begin", begin, counts.part(rank, "begin"))
        live += self._stacked - self._left(rank)
        for action in orders(self.layout, self.microbatches)[rank]:
            is_first = (action.kind, action.stage) not in seen
            seen.add((action.kind, action.stage))
            counted = {key: value for key, value in counts.action(action, is_first).items() if key not in HANDED}
            if self._hands_on(action, rank):
                counted |= dict(zip(HANDED, (1.0, float(self._handed)), strict=True))
            take(str(action), held.action(action, is_first), counted)
        take(REDUCE, reduce, counts.part(rank, REDUCE))
        live = lasting - update["change"]
        take(OPTIMISER, update, counts.part(rank, OPTIMISER))
        peak = max(most for _, _, most, _ in moments)
        place = {0: "first of the pipeline", self.layout.pp - 1: "last of the pipeline"}.get(rank, "between")
        number = rank * (self.job.processes // self.layout.pp)
        return _load(number, place, peak, lasting, total, tuple(moments), self.samples.base[self._place(rank)])

    def _arriving(self, rank: int) -> int:
        """Bytes of the places where stages receive that the small job does not have: for each microbatch its own."""
        last = self.layout.stages - 1
        places = sum((stage > 0) + (stage < last) for stage in stage_numbers(self.layout, rank))
        return places * self._handed * self.times

    def _left(self, rank: int) -> int:
        """Bytes that stages have left of the last step for the microbatches that the small job does not have: losses,
        and with a split backward pass the gradients that were handed on.
        """
        own = stage_numbers(self.layout, rank)
        split = self.layout.schedule in SPLIT
        handed = sum(stage > 0 and stage - 1 not in own for stage in own) if split else 0
        losses = 4 * (self._tokens + 1) if self.layout.stages - 1 in own else 0
        return (handed * self._handed + losses) * self.times

    @property
    def _stacked(self) -> int:
        """Bytes of what the schedule is given of the microbatches that the small job does not have."""
        return self._tokens * (3 * 8 + 4) * self.times  # tokens, positions, targets, weights

    @property
    def _tokens(self) -> int:
        """Of a microbatch, that one process of the pipeline has."""
        rows = self.job.rows // (self.layout.dp * self.layout.fsdp) // self.microbatches
        return rows * self.job.sequence_length // self.layout.context

    def _hands_on(self, action: Action, rank: int) -> bool:
        """Return whether what comes of an action goes to another process."""
        if action.kind == WEIGHT:
            return False
        following = action.stage + (1 if action.kind == FORWARD else -1)
        return 0 <= following < self.layout.stages and following not in stage_numbers(self.layout, rank)

    def _place(self, rank: int) -> int:
        """Return which of the sketch's ranks stands for a process of the pipeline."""
        count, last = len(self.sketch.ranks), self.layout.pp - 1
        return 0 if rank == 0 else count - 1 if rank == last else min(1, count - 1)


ValueOf = Callable[[Part], Values]


class _Costs:
    """Some values of the parts of samples, for the parts of the whole job."""

    def __init__(self, whole: Whole, value: ValueOf) -> None:
        self.whole, self.value = whole, value
        self.small = whole.sketch.small.resolved
        self.each = whole.job.processes // whole.layout.pp
        self._parts: dict[tuple[int, int, str], Values] = {}
        self._actions: dict[tuple[str, int, bool], Values] = {}
        self._ranks: dict[tuple[int, str], Values] = {}

    def action(self, action: Action, is_first: bool) -> Values:
        """Return it of an action of the whole job; is_first: of its kind in its stage."""
        key = action.kind, action.stage, is_first
        if key not in self._actions:
            samples, more = self.whole.samples, self.whole._more[action.stage]
            place, stage = self._standing(action.stage)
            grown = self._grown(action.stage)
            base = self._of(samples.base[place], action.kind, stage, is_first)
            here = self._of(samples.base[samples.place], action.kind, grown, is_first)
            others = [self._of(sample, action.kind, grown, is_first) for sample in samples.more]
            self._actions[key] = extended(base, here, others, more)
        return self._actions[key]

    def part(self, rank: int, name: str) -> Values:
        """Return it of what a process of the pipeline does besides actions: "begin", "reduce" or "optimiser"."""
        if (rank, name) not in self._ranks:
            samples = self.whole.samples
            base = samples.base[self.whole._place(rank)]
            here, others = samples.base[samples.place], samples.more
            self._ranks[rank, name] = extended(
                self._sum(base, name),
                self._sum(here, name),
                [self._sum(other, name) for other in others],
                self.whole.more_of(rank * self.each),
            )
        return self._ranks[rank, name]

    def lasting(self, rank: int) -> float:
        """Return bytes that a process of the pipeline holds between steps."""
        samples = self.whole.samples
        base, here = samples.base[self.whole._place(rank)], samples.base[samples.place]
        others = [{"lasting": float(other.lasting)} for other in samples.more]
        found = extended(
            {"lasting": float(base.lasting)},
            {"lasting": float(here.lasting)},
            others,
            self.whole.more_of(rank * self.each),
        )
        return found["lasting"]

    def _standing(self, stage: int) -> tuple[int, int]:
        """Return which of the sketch's ranks, and which stage of its, stands for a stage."""
        last = self.whole.layout.stages - 1
        own = 0 if stage == 0 else self.small.stages - 1 if stage == last else self._middle()
        return next(rank for rank in range(self.small.pp) if own in stage_numbers(self.small, rank)), own

    def _middle(self) -> int:
        """Return the stage of the small job that stands for those between the first and the last."""
        return min(stage_numbers(self.small, min(1, self.small.pp - 1)))

    def _grown(self, stage: int) -> int:
        """Return the stage of the small job where it is seen what a block adds to a stage of the whole job."""
        own = stage_numbers(self.small, self.whole.samples.place)
        return min(own) if stage == 0 or 0 not in own else max(own)

    def _of(self, sample: Sample, kind: str, stage: int, is_first: bool) -> Values:
        found = [
            (number, part)
            for number, part in enumerate(sample.parts)
            if (action := part.action) and (action.kind, action.stage) == (kind, stage)
        ]
        if not found:
            return {}
        number, part = found[0 if is_first else len(found) // 2]
        return self._valued(sample, number, part)

    def _sum(self, sample: Sample, name: str) -> Values:
        total: Values = {}
        for number, part in enumerate(sample.parts):
            if part.name == name:
                for key, value in self._valued(sample, number, part).items():
                    total[key] = total.get(key, 0.0) + value
        return total

    def _valued(self, sample: Sample, number: int, part: Part) -> Values:
        key = id(sample), number, part.name
        if key not in self._parts:
            self._parts[key] = self.value(part)
        return self._parts[key]


def _values(line: Timeline) -> Values:
    exposed = {EXPOSED + name: value for name, value in line.exposed.items()}
    return {SECONDS: line.seconds, COMPUTING: line.busy.get(COMPUTE, 0.0), **exposed}


def _held(part: Part, besides: int) -> Values:
    return {
        "live": float(part.live + besides),
        "peak": float(part.peak + besides),
        "after": float(part.after + besides),
    }


def _held_change(part: Part) -> Values:
    return {"rise": float(part.peak - part.live), "change": float(part.after - part.live)}


def _step(values: Values, bars: list[Bar], flowed: Flow | None = None) -> Step:
    exposed = {key.removeprefix(EXPOSED): value for key, value in values.items() if key.startswith(EXPOSED)}
    waited = {name: value for name, value in exposed.items() if value > 0}
    return Step(values[SECONDS], values[COMPUTING], waited, bars, flow=flowed)


def _load(
    rank: int,
    place: str,
    peak: float,
    lasting: float,
    counts: Values,
    moments: tuple[tuple[str, float, float, float], ...],
    sample: Sample,
) -> Load:
    names = [key.removeprefix("calls ") for key in counts if key.startswith("calls ")]
    sent = {name: Sent(round(counts[f"calls {name}"]), round(counts[f"bytes {name}"])) for name in sorted(names)}
    return Load(rank, place, peak, lasting, counts["flops"], counts["traffic"], sent, moments, sample)


def _bars(order: tuple[tuple[Action, ...], ...], flowed: Flow) -> list[Bar]:
    return list(_each_bar(order, flowed))


def _each_bar(order: tuple[tuple[Action, ...], ...], flowed: Flow) -> Iterator[Bar]:
    for rank, actions in enumerate(order):
        times = zip(actions, flowed.begins[rank], flowed.ends[rank], strict=True)
        yield from (Bar(f"stage {rank}", begin, end, str(action)) for action, begin, end in times)
