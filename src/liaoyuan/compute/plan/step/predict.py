"""A step of a job on a cluster before either exists: how long it takes, what it holds, and how sure that is.

What is exact is computed: calls, FLOPs, bytes, dependencies. What is not is a figure of the profile; each is moved by
itself to both ends of its 90% range, and what that does to the logarithm of the step is added in quadrature.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from liaoyuan.compute.plan.machine.cluster import GIB, Cluster
from liaoyuan.compute.plan.machine.cost import peak_flops
from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure, assumed
from liaoyuan.compute.plan.program.actions import BACKWARD, FORWARD, INPUT
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.program.layers import extended, sample, sketch
from liaoyuan.compute.plan.program.trace import Held
from liaoyuan.compute.plan.span import Span
from liaoyuan.compute.plan.step.spread import range_of, spread_of
from liaoyuan.compute.plan.step.step_time import StepTime
from liaoyuan.compute.plan.step.whole import BUBBLE, Load, Step, Whole
from liaoyuan.parallel.traffic import Sent

# Of the peak of tensors, what an allocator that keeps blocks loses to their sizes: nobody has measured it for this
# program; steps of equal shapes lose little.
FRAGMENTATION = Figure(median=0.03, sigma=0.7)
RESERVED = 0.3  # sigma of what the cluster's file says that the runtime and the collectives' buffers take
SHOWN = 12  # parts of what is held at the peak
MICROBATCHES = "kept for the backward passes of other microbatches"


@dataclass(frozen=True)
class Memory:
    """What the processes of one kind hold in a step, compute and send.

    rank: one of them. stage: their place in the pipeline, in words. tensors: bytes at the peak, of which `lasting` are
    held between steps; `held` says what they are, largest first. allowance: by name, bytes that come on top. total:
    both together; room: bytes that the card has for them. timeline: (second, bytes of tensors) where asked for.
    flops: of matrix products. sent: by axis and collective.
    """

    rank: int
    stage: str
    tensors: int
    lasting: int
    allowance: dict[str, Span]
    total: Span
    room: int
    held: tuple[Held, ...] = ()
    timeline: tuple[tuple[float, int], ...] = ()
    flops: float = 0.0
    sent: dict[str, Sent] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether it does by the median."""
        return self.total.median <= self.room


@dataclass(frozen=True)
class Prediction:
    """A step of a job on a cluster.

    step: how long it takes. memory: of each kind of process. tokens_per_second: of one card. model_utilisation,
    hardware_utilisation: model FLOPs, and those executed (recomputation too), over what a card's peak would do. bubble:
    share of the step in which a card waits for other stages. width: by figure of the profile, the share of the
    uncertainty (variance of the logarithm) that comes from it, largest first. rests_on: what it rests on, in words.
    """

    step: StepTime
    memory: tuple[Memory, ...]
    tokens_per_second: Span
    model_utilisation: Span
    hardware_utilisation: Span
    bubble: float
    width: dict[str, float]
    rests_on: str

    @property
    def fits(self) -> bool:
        """Whether every kind of process fits its card."""
        return all(one.fits for one in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"fits": self.fits, **asdict(self)}


def predict(
    job: Job, cluster: Cluster, profile: DeviceProfile | None = None, details: bool = False, at_once: int = 2
) -> Prediction:
    """Return how a step of the job goes on this cluster, whose cards are those of the profile (None: `assumed`).

    details: with bars (`StepTime.bars`) and a memory timeline for each kind of process.
    at_once: how many processes run dry at the same time.

    Raises:
        LiaoyuanError: the layout does not fit the job.
    """
    profile = profile or assumed(cluster)
    plan = sketch(job)
    whole = Whole(plan, sample(plan, at_once), cluster)
    return _predicted(whole, profile, details)


def _predicted(whole: Whole, profile: DeviceProfile, details: bool) -> Prediction:
    job = whole.job
    middle = whole.step(profile.median(), details)
    found = spread_of(lambda one: whole.step(one).seconds * one.step.median, profile)
    seconds = found.span
    loads = whole.loads()
    peak = peak_flops(job.model.dtype, profile)
    rests_on = f"a dry run of the program; {profile.rests_on}"
    return Prediction(
        StepTime(seconds, middle.computing, middle.exposed, tuple(middle.bars), rests_on),
        tuple(_memory(load, whole, middle, details) for load in loads),
        seconds.under(job.tokens / job.processes),
        seconds.under(job.flops / job.processes / peak),
        seconds.under(whole.executed / peak),
        middle.exposed.get(BUBBLE, 0.0) / middle.seconds,
        found.shares,
        rests_on,
    )


def _memory(load: Load, whole: Whole, step: Step, details: bool) -> Memory:
    card = whole.cluster.accelerator
    reserved = Figure(median=max(card.reserved_gib * GIB, 1.0), sigma=RESERVED)
    lost = Figure(median=max(load.peak, 1.0) * FRAGMENTATION.median, sigma=FRAGMENTATION.sigma)
    allowance = {"runtime and buffers of collectives": range_of(reserved), "fragmentation": range_of(lost)}
    most = sum(span.median for span in allowance.values())
    above = math.hypot(*(span.high - span.median for span in allowance.values()))
    below = math.hypot(*(span.median - span.low for span in allowance.values()))
    total = Span(load.peak + most - below, load.peak + most, load.peak + most + above)
    room = int(card.memory_gib * GIB)
    return Memory(
        load.rank,
        load.place,
        round(load.peak),
        round(load.lasting),
        allowance,
        total,
        room,
        _held(load, whole),
        tuple(_timeline(load, whole, step)) if details else (),
        load.flops,
        load.sent,
    )


def _held(load: Load, whole: Whole) -> tuple[Held, ...]:
    """Return what is held at the peak: as in the sample, with all layers; what is left then are more microbatches."""
    samples = whole.samples
    base, here = _sizes(load.sample.held), _sizes(samples.base[samples.place].held)
    others = [_sizes(sample.held) for sample in samples.more]
    made = {_key(one): one for sample in (*samples.base, *samples.more) for one in sample.held}
    values = extended(base, here, others, whole.more_of(load.rank))
    found = [replace(made[key], bytes=round(size)) for key, size in values.items() if size >= 1]
    rest = round(load.peak) - sum(one.bytes for one in found)
    if rest > 0:
        found.append(Held("layers.*", MICROBATCHES, "forward", rest, 0))
    return tuple(sorted(found, key=lambda one: -one.bytes)[:SHOWN])


def _key(one: Held) -> str:
    return f"{one.module} {one.operator} {one.phase}"


def _sizes(held: tuple[Held, ...]) -> dict[str, float]:
    return {_key(one): float(one.bytes) for one in held}


def _timeline(load: Load, whole: Whole, step: Step) -> list[tuple[float, int]]:
    """Return bytes held over time: at the begin of each part of the step, at most, and at its end.

    What is kept for the backward pass is most at the end of a forward pass and at the begin of a backward one.
    """
    parts = list(load.moments)
    if step.flow is None:
        times = list(zip(step.begins, step.begins[1:], strict=False))
        if whole.middle:
            first, last = step.begins[whole.middle.start], step.begins[whole.middle.stop]
            stop = whole.middle.stop
            order = [(n, 0) for n in range(stop)]
            order += [(n, again) for again in range(1, whole.times + 1) for n in whole.middle]
            order += [(n, whole.times) for n in range(stop, len(parts))]
            times = [(times[n][0] + again * (last - first), times[n][1] + again * (last - first)) for n, again in order]
            parts = [parts[n] for n, _ in order]
    else:
        rank = load.rank // (whole.job.processes // whole.layout.pp)
        begins, ends = step.flow.begins[rank], step.flow.ends[rank]
        rest = (step.seconds - ends[-1]) / 2
        times = [(0.0, begins[0]), *zip(begins, ends, strict=True)]
        times += [(ends[-1], ends[-1] + rest), (ends[-1] + rest, step.seconds)]
    found = []
    for (begin, end), (name, live, peak, after) in zip(times, parts, strict=True):
        kind = name.split()[0]
        most = end if kind == FORWARD else begin if kind in (BACKWARD, INPUT) else (begin + end) / 2
        found += [(begin, round(live)), (most, round(peak)), (end, round(after))]
    return found
