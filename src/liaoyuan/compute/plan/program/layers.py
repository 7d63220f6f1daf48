"""A large job told from small ones: few layers are run dry and multiplied, few microbatches and stages likewise.

Layers of a kind do the same, so what a step takes, sends and holds grows by the same amount with each: it is measured
on a model with few of each kind, and on one with one more. Stages of a pipeline differ by their place alone: the
first, the last, and those between. The schedule itself is that of the whole pipeline (`flow.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from liaoyuan.compute.plan.program.actions import Action
from liaoyuan.compute.plan.program.apart import apart_each
from liaoyuan.compute.plan.program.dry_run import Job, dry_run
from liaoyuan.compute.plan.program.footprint import alike
from liaoyuan.compute.plan.program.ops import Op, ops_of
from liaoyuan.compute.plan.program.trace import Event, Held, Trace
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import program
from liaoyuan.parallel.layout import fewest_microbatches
from liaoyuan.parallel.pipeline import cut_layers

FEW = 2  # layers of each kind in a model without stages; with stages, one in each
MICROBATCHES = 3  # of a step that is run dry, the second of which is like all others between the first and the last
STAGES = 3
SPLIT = ("zbv", "dualpipev")  # schedules that split the backward pass, where the first stage has no input's part
CUT = "cut_layers"  # by this name `program` cuts a model into stages
PHASES = ("forward", "backward", "update")
Block = tuple[tuple[bool, int | None], ...]  # layers that repeat together: of each, whether it is sparse, its window
Values = dict[str, float]


@dataclass(frozen=True)
class Part:
    """A part of a step that was run dry (`actions.py` has the names): its calls, and bytes held.

    live: when it begins, `peak` at most, `after` when it has ended. counts: "flops", "traffic", and by axis and kind
    "calls tp all-gather" and "bytes tp all-gather". handed: bytes of its last send along the pipeline.
    """

    name: str
    ops: tuple[Op, ...]
    live: int
    peak: int
    after: int
    counts: Values
    handed: int

    @property
    def action(self) -> Action | None:
        """Which action of a pipeline it is, if one."""
        return Action.parse(self.name)


@dataclass(frozen=True)
class Sample:
    """A dry run of one process of a small job."""

    parts: tuple[Part, ...]
    lasting: int
    peak: int
    held: tuple[Held, ...]


@dataclass(frozen=True)
class Samples:
    """base: of each of the sketch's `ranks`. more: with one more block of each of its `kinds`, of the rank at `place`:
    what a block adds is the same everywhere, but for the first stage where the backward pass is split.
    """

    base: tuple[Sample, ...]
    place: int
    more: tuple[Sample, ...]


@dataclass(frozen=True)
class Sketch:
    """The small jobs that stand for a large one.

    small: how the job is cut down, but for its layers. base: layers of each stage, as blocks. kinds: blocks of which
    there are samples with one more. ranks: processes of the small job that stand for places in the pipeline.
    """

    job: Job
    small: Job
    base: tuple[Block, ...]
    kinds: tuple[Block, ...]
    ranks: tuple[int, ...]

    @cached_property
    def stages(self) -> list[Counter[Block]]:
        """How many blocks of each kind each stage of the whole job has."""
        return [Counter(blocks_of(self.job, own)) for own in _cut(self.job)]

    def more(self, counts: Mapping[Block, int], stages: int = 1) -> list[float]:
        """Return how many blocks of each of `kinds` there are beyond those of the base, of which `stages` have one."""
        here = Counter(self.base)
        return [(counts.get(kind, 0) - stages * here[kind]) / stages for kind in self.kinds]


def sketch(job: Job) -> Sketch:
    """Return the small jobs that stand for this one."""
    layout = job.resolved
    own = [blocks_of(job, layers) for layers in _cut(job)]
    counts = Counter(block for blocks in own for block in blocks)
    few = FEW if layout.pp == 1 else 1
    base = _few(own[0], few) if layout.pp == 1 else tuple(sorted(counts, key=_last_if_short))
    kinds = tuple(kind for kind, count in counts.items() if layout.pp > 1 or count > few)
    if layout.pp > 1 and all(Counter(blocks) == Counter(base) for blocks in own):
        kinds = ()
    small = _smaller(job)
    each = job.processes // layout.pp
    return Sketch(job, small, base, kinds, tuple(rank * each for rank in range(small.resolved.pp)))


def sample(sketch: Sketch, at_once: int = 2) -> Samples:
    """Run the small jobs dry, so many processes at the same time."""
    place = 0 if sketch.small.resolved.schedule in SPLIT else min(1, len(sketch.ranks) - 1)
    calls = [(sketch.small, sketch.base, rank) for rank in sketch.ranks]
    calls += [(sketch.small, _with(sketch.base, kind), sketch.ranks[place]) for kind in sketch.kinds]
    found = apart_each(_sample, calls, at_once)
    count = len(sketch.ranks)
    return Samples(tuple(found[:count]), place, tuple(found[count:]))


def extended(
    base: Mapping[str, float], here: Mapping[str, float], others: Sequence[Mapping[str, float]], more: Sequence[float]
) -> Values:
    """Return what `base` has and so many times what one more of each kind adds.

    here: where `others`, with one more each, were measured: often `base` itself.
    """
    total = dict(base)
    for other, times in zip(others, more, strict=True):
        for key in {*here, *other} if times else ():
            total[key] = total.get(key, 0.0) + times * (other.get(key, 0.0) - here.get(key, 0.0))
    return total


def blocks_of(job: Job, layers: Sequence[int]) -> list[Block]:
    """Return layers as the blocks in which they repeat: of recomputation, which may take but each n-th."""
    layout, model = job.layout, job.model
    length = layout.recompute_every if layout.recompute != "none" else 1
    kinds = [(model.is_sparse(layer), model.window(layer)) for layer in layers]
    return [tuple(kinds[begin : begin + length]) for begin in range(0, len(kinds), length)]


def with_layers(config: ModelConfig, layers: Sequence[tuple[bool, int | None]]) -> ModelConfig:
    """Return a model with layers of these kinds alone."""
    experts = config.experts
    if experts:
        dense = tuple(number for number, (is_sparse, _) in enumerate(layers) if not is_sparse)
        experts = replace(experts, dense_layers=dense)
    full = tuple(number for number, (_, window) in enumerate(layers) if window is None)
    return replace(
        config,
        num_hidden_layers=len(layers),
        experts=experts,
        full_layers=full if config.sliding_window is not None else config.full_layers,
    )


def _few(blocks: Sequence[Block], few: int) -> tuple[Block, ...]:
    """Return the first few blocks of each kind, in order."""
    seen, found = Counter[Block](), list[Block]()
    for block in blocks:
        if seen[block] < few:
            found.append(block)
        seen[block] += 1
    return tuple(found)


def _with(base: tuple[Block, ...], kind: Block) -> tuple[Block, ...]:
    place = base.index(kind)
    return (*base[:place], kind, *base[place:])


def _last_if_short(block: Block) -> tuple[int, str]:
    return -len(block), str(block)


def _smaller(job: Job) -> Job:
    """Return the job with few microbatches and stages, and as many rows in each microbatch."""
    layout, train = job.resolved, job.train
    stages = min(layout.pp, 2 if layout.schedule in SPLIT else STAGES)
    layout = layout.model_copy(update={"pp": stages})
    few = max(fewest_microbatches(layout), MICROBATCHES if stages == 1 else stages)
    if layout.schedule == "interleaved" and stages > 1:
        few = -(-few // stages) * stages
    count = min(train.microbatches, few)
    rows = job.rows // train.microbatches * count
    train = train.model_copy(update={"microbatches": count, "batch_tokens": rows * job.sequence_length})
    return replace(job, layout=layout, processes=job.processes // job.resolved.pp * stages, train=train)


def _cut(job: Job) -> list[range]:
    layout = job.resolved
    if layout.pp == 1:
        return [range(job.model.num_hidden_layers)]
    return cut_layers(job.model, layout.stages)


def _sample(job: Job, blocks: tuple[Block, ...], rank: int) -> Sample:
    layers = [layer for block in blocks for layer in block]
    with _cut_equally():
        job = replace(job, model=with_layers(job.model, layers * job.resolved.stages))
        trace = dry_run(job, rank, steps=1 if job.resolved.pp == 1 else 2)  # pipelines prepare much in their first
    return Sample(tuple(_parts(trace, job)), trace.after, trace.peak, tuple(alike(trace.held)))


@contextmanager
def _cut_equally() -> Iterator[None]:
    """Let every stage have the same layers, whatever they cost."""
    real = getattr(program, CUT)

    def cut(config: ModelConfig, stages: int) -> list[range]:
        each = config.num_hidden_layers // stages
        return [range(stage * each, (stage + 1) * each) for stage in range(stages)]

    setattr(program, CUT, cut)
    try:
        yield
    finally:
        setattr(program, CUT, real)


def _parts(trace: Trace, job: Job) -> Iterator[Part]:
    """Yield the parts of a trace. In a pipeline each has the numbers of its ops from 0 on; else all are one sequence,
    since what is under way at a mark stays so, and phases are parts as well.
    """
    streams, overlap, piped = job.device != "cpu", job.layout.overlap, job.resolved.pp > 1
    ops, places = ops_of(trace.events, streams, overlap)
    begins = [n for n, mark in enumerate(trace.marks) if not piped or mark.name not in PHASES]
    for begin, following in zip(begins, [*begins[1:], None], strict=True):
        marks = trace.marks[begin:following]
        mark = marks[0]
        end = len(trace.events) if following is None else trace.marks[following].event
        events = trace.events[mark.event : end]
        own = ops_of(events, streams, overlap)[0] if piped else ops[places[mark.event] : places[end]]
        after = trace.after if following is None else trace.marks[following].live
        peak = max(one.peak for one in marks)
        yield Part(mark.name, tuple(own), mark.live, peak, after, _counts(events), _handed(events))


def _counts(events: Sequence[Event]) -> Values:
    found = Counter[str]()
    for event in events:
        found["flops"] += event.flops
        found["traffic"] += event.traffic
        if event.collective:
            key = f"{event.collective.axis} {event.collective.kind}"
            found[f"calls {key}"] += 1
            found[f"bytes {key}"] += event.collective.bytes
    return {key: float(value) for key, value in found.items()}


def _handed(events: Sequence[Event]) -> int:
    sends = [event.collective.bytes for event in events if event.collective and event.collective.axis == "pp"]
    return sends[-1] if sends else 0
