"""Why not the neighbour: for each axis of the best layout, what one step up or down would change, in a sentence."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from liaoyuan.compute.plan.machine.cluster import GIB
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.search.bounds import FLOOR, Memory, memory
from liaoyuan.compute.plan.search.estimate import Estimator
from liaoyuan.compute.plan.search.search import Choice, Ranking
from liaoyuan.compute.plan.search.space import RECOMPUTE, describe
from liaoyuan.parallel.layout import Layout, Schedule, divisors, objection

ALIKE = 0.005  # two steps whose lengths differ by less are as long
PARTS = {
    "gathered": "weights gathered whole",
    "gradients": "gradients",
    "activations": "activations of the microbatches in flight",
    "passing": "what a layer makes while it is at work",
    "lasting": "weights, masters and moments",
}
AXES = {  # where a step's time goes, in words
    "computing": "computing",
    "bubble": "waiting for other stages",
    "shard": "waiting for weights and gradients of fsdp",
    "expert_shard": "waiting for weights and gradients of experts",
    "dp": "waiting for the sums over replicas",
    "tp": "waiting for tp",
    "ring": "waiting for the ring",
    "ulysses": "waiting for ulysses",
    "ep": "waiting for rows of experts",
    "pp": "handing on between stages",
}


@dataclass(frozen=True)
class Reason:
    """Why a neighbour is not the best. axis: in which it differs. slower: by which share, None: it cannot be or fit."""

    axis: str
    neighbour: str
    sentence: str
    slower: float | None = None


def reasons(ranking: Ranking, profile: DeviceProfile) -> list[Reason]:
    """Return for each legal neighbour of the best layout why it is not it, those that come nearest first."""
    certain = profile.median()
    estimator = Estimator(Fabric(ranking.cluster, certain), certain)
    known = {describe(choice.job): choice for choice in ranking.choices[: ranking.whole]}
    known |= {describe(choice.job): choice for choice, _ in ranking.refused}
    found = [_told(ranking, axis, job, estimator, known) for axis, job in _neighbours(ranking.best.job)]
    return sorted(found, key=lambda one: (one.slower is None, one.slower or 0.0))


def _told(ranking: Ranking, axis: str, job: Job, estimator: Estimator, known: dict[str, Choice]) -> Reason:
    words, best = describe(job), ranking.best
    room = ranking.cluster.accelerator.usable_bytes
    predicted = known.get(words)
    held = memory(job)
    bytes_held = predicted.bytes if predicted else held.peak
    if bytes_held > room or (not predicted and held.peak * FLOOR > room):
        return Reason(axis, words, _too_large(bytes_held, held, best.memory, room))
    if predicted and predicted.found and best.found:
        ours, theirs = best.found, predicted.found
        seconds, before = theirs.seconds.median, ours.seconds.median
        parts = ({"computing": theirs.computing} | theirs.exposed, {"computing": ours.computing} | ours.exposed)
        source = ""
    else:
        estimate = estimator.of(job)
        seconds, before = estimate.seconds, best.estimate.seconds
        parts = (
            {"computing": estimate.computing} | estimate.exposed,
            {"computing": best.estimate.computing} | best.estimate.exposed,
        )
        source = "by the formulas "
    slower = seconds / before - 1
    return Reason(axis, words, f"is {source}{_slower(slower, *parts)}", slower)


def _too_large(held: float, memory: Memory, best: Memory, room: int) -> str:
    more = {name: getattr(memory, name) - getattr(best, name) for name in PARTS}
    part = max(more, key=lambda name: more[name])
    return (
        f"does not fit: it holds about {held / GIB:,.1f} of {room / GIB:,.1f} GiB, "
        f"{getattr(memory, part) / GIB:,.1f} of them {PARTS[part]} (here {getattr(best, part) / GIB:,.1f})."
    )


def _slower(slower: float, theirs: dict[str, float], ours: dict[str, float]) -> str:
    if abs(slower) < ALIKE:
        return "as fast."
    sign = 1 if slower > 0 else -1
    more = {name: sign * (theirs.get(name, 0.0) - ours.get(name, 0.0)) for name in {*theirs, *ours}}
    part = max(sorted(more), key=lambda name: more[name])
    told = f"{AXES.get(part, part)} takes {_seconds(theirs.get(part, 0.0))} instead of {_seconds(ours.get(part, 0.0))}."
    return f"{abs(slower):.1%} {'slower' if slower > 0 else 'faster'}: {told}"


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.3g} ms"


def _neighbours(job: Job) -> Iterator[tuple[str, Job]]:
    """Yield the legal jobs that differ in one axis by one step, with its name."""
    seen = {describe(job)}
    for axis, changes in _steps(job):
        for found in _with(job, **changes) if axis != "microbatches" else _cut(job, **changes):
            if describe(found) not in seen:
                seen.add(describe(found))
                yield axis, found


def _cut(job: Job, microbatches: int) -> Iterator[Job]:
    found = replace(job, train=job.train.model_copy(update={"microbatches": microbatches}))
    if objection(found.layout, found.processes, found.shape) is None:
        yield found


def _steps(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    layout, microbatches = job.layout, job.train.microbatches
    for mode in RECOMPUTE:
        if mode != layout.recompute:
            yield "recompute", {"recompute": mode}
    if layout.pp > 1:
        for schedule in get_args(Schedule):
            if schedule not in (layout.schedule, "gpipe"):
                yield "schedule", {"schedule": schedule}
    for value in _beside(microbatches, divisors(max(1, job.rows // (layout.dp * layout.fsdp)))):
        yield "microbatches", {"microbatches": value}
    for axis in ("tp", "pp", "ep", "dp"):
        size = getattr(layout, axis)
        if axis == "ep" and job.model.experts is None:
            continue
        for value in _beside(size, divisors(job.processes)):
            yield axis, {axis: value}
    for axis in ("ulysses", "ring"):
        for value in _beside(getattr(layout.cp, axis), divisors(job.processes)):
            yield axis, {"cp": layout.cp.model_copy(update={axis: value})}


def _beside(value: int, values: list[int]) -> list[int]:
    place = values.index(value)
    return values[max(0, place - 1) : place] + values[place + 1 : place + 2]


def _with(job: Job, **changes: Any) -> Iterator[Job]:
    """Yield the job with one axis changed and the least else: fsdp has what the others leave or gives what they need,
    else the first axis that can; microbatches are as many as rows allow, and no more than they were. Or nothing.
    """
    layout = job.layout.model_copy(update=changes)
    for giving in ("", "dp", "ring", "ulysses", "pp", "tp"):
        changed = _given(layout, giving, job.processes) if not giving or giving not in changes else None
        if changed is None:
            continue
        if changed.pp == 1:
            changed = changed.model_copy(update={"schedule": "1f1b"})
        rows = job.rows // (changed.dp * changed.fsdp)
        for microbatches in reversed([n for n in divisors(max(1, rows)) if n <= job.train.microbatches]):
            train = job.train.model_copy(update={"microbatches": microbatches})
            found = replace(job, layout=changed, train=train)
            if objection(changed, job.processes, found.shape) is None:
                yield found
                return


def _given(layout: Layout, giving: str, processes: int) -> Layout | None:
    """Return the layout on so many processes, of which fsdp has the rest once the axis `giving` has given."""
    others = layout.pp * layout.dp * layout.context * layout.tp
    if not giving:
        return layout.model_copy(update={"fsdp": processes // others}) if processes % others == 0 else None
    inner = giving in ("ring", "ulysses")
    size = getattr(layout.cp if inner else layout, giving)
    for less in reversed(divisors(size)[:-1]):
        if processes % (others // size * less) == 0:
            cut = {"cp": layout.cp.model_copy(update={giving: less})} if inner else {giving: less}
            return _given(layout.model_copy(update=cut), "", processes)
    return None
