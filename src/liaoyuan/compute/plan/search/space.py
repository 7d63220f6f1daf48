"""The layouts that a job may have on so many processes: every axis, schedule, cut into microbatches, recomputation.

What is legal `parallel.layout` says; here is which are worth asking for. Left out, unless they are kept by name: GPipe,
which waits as long as 1F1B and holds more; sequences cut finer than `PIECE` tokens a process; and replicas (dp) of
which none is a whole level of the network, all of them (plain data parallelism), or one (all sharded). Microbatches are
no axis, but decide with the layout what a process holds and how long a pipeline waits, so they are chosen together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.parallel.layout import ContextParallel, Layout, Schedule, divisors, objection

RECOMPUTE = ("none", "selective", "full")
PIECE = 1024  # tokens of a sequence that a process of cp has at least
AXES = ("dp", "fsdp", "tp", "ulysses", "ring", "pp", "schedule", "ep", "microbatches", "recompute")


@dataclass(frozen=True)
class Kept:
    """What the search leaves as it is given: by name of an axis, its value."""

    values: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(values: dict[str, Any]) -> "Kept":
        """Return it, of values by name.

        Raises:
            LiaoyuanError: there is no such axis.
        """
        for name in values:
            if name not in AXES:
                raise LiaoyuanError(f"The search knows no axis '{name}'{nearest(name, AXES) or '.'}")
        return Kept(tuple(sorted(values.items())))

    def among(self, axis: str, found: Any) -> Any:
        """Return those of the found values that may be, all of them or the one that is kept."""
        kept = dict(self.values)
        return [value for value in found if value == kept[axis]] if axis in kept else found

    def has(self, axis: str) -> bool:
        return axis in dict(self.values)


def candidates(job: Job, kept: Kept | None = None, reaches: tuple[int, ...] = (), piece: int = PIECE) -> Iterator[Job]:
    """Yield the job in each legal layout, filled in; its other settings (overlap, exact, compile) stay as they are.

    reaches: of the levels of the network, within which weights may be sharded and beyond which replicated.
    """
    kept = kept or Kept()
    base = dict(job.layout)
    for axes in _axes(job, kept, reaches, piece):
        tp, ulysses, ring, pp, schedule, dp, fsdp, ep = axes
        if pp * dp * fsdp * ulysses * ring * tp != job.processes:
            continue
        cp = ContextParallel.model_construct(ulysses=ulysses, ring=ring)
        for microbatches in kept.among("microbatches", divisors(max(1, job.rows // (dp * fsdp)))):
            train = job.train.model_copy(update={"microbatches": microbatches})
            shape = replace(job.shape, microbatches=microbatches)
            first = Layout.model_construct(
                **base | {"tp": tp, "cp": cp, "pp": pp, "schedule": schedule, "dp": dp, "fsdp": fsdp, "ep": ep}
            )
            if objection(first, job.processes, shape):
                continue
            for recompute in kept.among("recompute", RECOMPUTE):
                layout = first.model_copy(update={"recompute": recompute})
                yield replace(job, layout=layout, train=train)


def _axes(job: Job, kept: Kept, reaches: tuple[int, ...], piece: int) -> Iterator[tuple[Any, ...]]:
    """Yield (tp, ulysses, ring, pp, schedule, dp, fsdp, ep) whose product is right, as far as cheap checks tell."""
    model, processes = job.model, job.processes
    finest = job.sequence_length if kept.has("ulysses") or kept.has("ring") else max(1, job.sequence_length // piece)
    usual = get_args(Schedule) if kept.has("schedule") else [one for one in get_args(Schedule) if one != "gpipe"]
    for tp in kept.among("tp", _common(model.num_key_value_heads, processes)):
        heads = model.num_attention_heads // tp
        for pp in kept.among("pp", _up_to(processes // tp, model.num_hidden_layers)):
            rest = processes // (tp * pp)
            schedules = usual if pp > 1 else ["1f1b"]
            for ulysses in kept.among("ulysses", _common(heads, rest)):
                for ring in kept.among("ring", divisors(rest // ulysses)):
                    data = rest // (ulysses * ring)
                    if job.rows % data or ulysses * ring > finest:
                        continue
                    alike = tp * ulysses * ring
                    whole = (kept.has("dp") or kept.has("fsdp") or not reaches) and divisors(data)
                    for fsdp in kept.among("fsdp", whole or _shards(data, alike, reaches)):
                        for dp in kept.among("dp", [data // fsdp]):
                            for ep in kept.among("ep", _expert_axes(job, fsdp * ulysses * ring * tp)):
                                for schedule in kept.among("schedule", schedules):
                                    yield tp, ulysses, ring, pp, schedule, dp, fsdp, ep


def _shards(data: int, alike: int, reaches: tuple[int, ...]) -> list[int]:
    """Return over how many of `data` processes, of `alike` others each, weights are worth sharding."""
    return [n for n in divisors(data) if n in (1, data) or n * alike in reaches]


def _common(number: int, other: int) -> list[int]:
    return [n for n in divisors(number) if other % n == 0]


def _up_to(number: int, most: int) -> list[int]:
    return [n for n in divisors(number) if n <= most]


def _expert_axes(job: Job, shared: int) -> list[int]:
    return _common(job.model.experts.num_experts, shared) if job.model.experts else [1]


def axes_used(layout: Layout) -> int:
    """Return how many axes a layout uses, recomputation and another schedule than 1F1B among them."""
    sizes = (layout.dp, layout.fsdp, layout.tp, layout.cp.ulysses, layout.cp.ring, layout.pp, layout.ep)
    return sum(size > 1 for size in sizes) + (layout.recompute != "none") + (layout.schedule != "1f1b")


def describe(job: Job) -> str:
    """Return a layout in words: its axes, schedule, microbatches and recomputation."""
    layout, microbatches = job.layout, job.train.microbatches
    parts = [layout.describe()]
    if layout.pp > 1 and layout.schedule != "1f1b":
        parts.append(layout.schedule)
    parts.append(f"{microbatches} microbatch{'es' if microbatches > 1 else ''}")
    if layout.recompute != "none":
        parts.append(f"recompute {layout.recompute}")
    return ", ".join(parts)
