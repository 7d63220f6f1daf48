"""How long a step of a layout takes at least, and about, by formulas: milliseconds where a dry run takes a minute.

Both price the same work and the same bytes (`parallel.closed_form`) by the same figures as the whole prediction does.
`floor` has products and attention alone, and waiting that no schedule can avoid; `seconds` has all else too, with rough
rules for what is hidden behind computing. It decides which layouts are worth a whole prediction, and no more.
"""

import functools
from dataclasses import dataclass, field, replace

from liaoyuan.compute.plan.machine.cost import seconds as price
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.program.work import Work, stream
from liaoyuan.compute.plan.search.bounds import Layers, held_weights, layers_at, tokens_of
from liaoyuan.compute.plan.search.layer_terms import LayerWork, Place, gradients, layer_work, product_of
from liaoyuan.parallel import Layout, Traffic, closed_form
from liaoyuan.parallel.pipeline import stage_numbers

OPTIMISER_BYTES = 44  # read and written for each weight of a process: gradient, norm, moments, master, copy
CALLS = 75  # of operators, for a layer of a microbatch, forward and backward
CHUNKS = {"tp": 4, "ep": 2}  # in which tokens travel while others are computed


@dataclass(frozen=True)
class Estimate:
    """Of a step. floor, seconds: see above. computing: of the busiest process, products and all else. flops: of that
    process, as executed. exposed: by axis, about how long it waits; "bubble" for other stages. sent: its traffic.
    """

    floor: float
    seconds: float
    computing: float
    flops: float
    exposed: dict[str, float] = field(default_factory=dict)
    sent: Traffic = field(default_factory=dict)


class Estimator:
    """Estimates steps on cards and links whose figures are certain (`profile.median()`)."""

    def __init__(self, fabric: Fabric, profile: DeviceProfile) -> None:
        self.fabric, self.profile = fabric, profile
        self._layer = functools.lru_cache(maxsize=65536)(self._priced)
        self._transfer = functools.lru_cache(maxsize=65536)(self._travel)

    def of(self, job: Job) -> Estimate:
        """Return the estimate of a job whose layout is resolved."""
        layout = job.layout
        terms = Place.of(job.model, layout, tokens_of(job), job.sequence_length)
        stages = [self._stage(terms, layers, n, layout) for n, layers in self._stages(job)]
        found = [self._at(job, terms, stages, place) for place in _places(layout, job.train.microbatches, stages)]
        slowest = max(found, key=lambda one: one.seconds)
        return Estimate(
            _floor_of(job, stages),
            slowest.seconds,
            slowest.computing,
            max(one.flops for one in found),
            slowest.exposed,
            slowest.sent,
        )

    def at(self, job: Job, place: int) -> Estimate:
        """Return what a process at a place of the pipeline computes, waits for and sends; without the floor."""
        terms = Place.of(job.model, job.layout, tokens_of(job), job.sequence_length)
        stages = [self._stage(terms, layers, n, job.layout) for n, layers in self._stages(job)]
        return self._at(job, terms, stages, place)

    def floor(self, job: Job) -> float:
        """Return the seconds that no step of the job can be shorter than."""
        terms = Place.of(job.model, job.layout, tokens_of(job), job.sequence_length)
        return _floor_of(job, [self._stage(terms, layers, n, job.layout) for n, layers in self._stages(job)])

    def _stages(self, job: Job) -> list[tuple[int, Layers]]:
        layout, found = job.layout, dict[int, Layers]()
        for place in range(layout.pp):
            numbers = stage_numbers(layout, place) if layout.pp > 1 else [0]
            found |= dict(zip(numbers, layers_at(job.model, layout, place), strict=True))
        return sorted(found.items())

    def _stage(self, terms: Place, layers: Layers, number: int, layout: Layout) -> "_Stage":
        parts = [(self._layer(terms, layer, again), count) for layer, again, count in layers]
        total = sum((part.times(count) for part, count in parts), start=_Stage())
        if number == layout.stages - 1:
            total += self._head(terms)
        if number and layout.pp > 1 and layout.schedule == "zbv":
            total = total.twice()
        return total

    def _priced(self, terms: Place, layer: int, again: bool) -> "_Stage":
        work = layer_work(terms, layer, again)
        both = (*work.backward, *work.again)
        return _Stage(
            self._seconds(work.forward),
            self._seconds(both),
            self._seconds(_heavy(work.forward)),
            self._seconds(_heavy(both)),
            self._seconds(_inputs(work)),
            work.flops,
            self._seconds(_gradients(work)),
            sum(one.flops for one in _gradients(work)),
        )

    def _head(self, terms: Place) -> "_Stage":
        forward = product_of(terms, terms.tokens, terms.model.vocab_size // terms.tp, terms.model.hidden_size)
        backward = gradients(forward)
        back = self._seconds(backward)
        return _Stage(
            price(forward, self.profile),
            back,
            price(forward, self.profile),
            back,
            back / 2,
            3 * forward.flops,
            back,
            2 * forward.flops,
        )

    def _seconds(self, works: tuple[Work, ...]) -> float:
        return sum(price(work, self.profile) for work in works)

    def _at(self, job: Job, terms: Place, stages: list["_Stage"], place: int) -> Estimate:
        """Return what a process at a place of the pipeline does in a step."""
        layout, microbatches = job.layout, job.train.microbatches
        own = [stages[number] for number in (stage_numbers(layout, place) if layout.pp > 1 else [0])]
        work = sum(own, start=_Stage())
        layers = sum(count for part in layers_at(job.model, layout, place) for _, _, count in part)
        launches = CALLS * layers * self.profile.launch.median
        if layout.pp > 1 and layout.schedule == "dualpipev":  # splits about so many of its backward passes
            part = min(1.0, layout.pp / (2 * microbatches))
            work = replace(
                work, backward=work.backward + part * work.products, flops=work.flops + part * work.product_flops
            )
        one_pass = max(work.forward + work.backward, launches)
        weights = held_weights(job.model, layout, place)
        update = price(stream(float(weights.own * OPTIMISER_BYTES)), self.profile)
        tokens, element = terms.tokens * layout.context, job.model.torch_dtype.itemsize
        sent = closed_form(layout, job.model, tokens, microbatches, element, place, job.device)
        exposed = self._exposed(layout, sent, one_pass * microbatches, microbatches, layers)
        busy = one_pass * microbatches + sum(exposed.values())
        slower = busy / max(one_pass * microbatches, 1e-12)
        fill, drain = _waits(layout, stages, place)
        if layout.pp > 1:
            exposed["bubble"] = (fill + drain) * slower
            exposed["pp"] = 2 * (layout.stages - 1) * self._hop(layout, sent)
        computing = one_pass * microbatches + update
        seconds = computing + sum(exposed.values())
        return Estimate(0.0, seconds, computing, work.flops * microbatches, exposed, sent)

    def _exposed(
        self, layout: Layout, sent: Traffic, computing: float, microbatches: int, layers: int
    ) -> dict[str, float]:
        """Return by axis about how long computing waits for it."""
        behind = computing / self.profile.contention.median if layout.overlap else 0.0
        found = dict[str, float]()
        for (axis, kind), told in sent.items():
            if axis == "pp" or not told.calls:
                continue
            ranks = ranks_of(layout, axis)
            seconds = told.calls * self._transfer(kind.removesuffix(" of counts"), told.bytes / told.calls, ranks)
            found[axis] = found.get(axis, 0.0) + seconds
        for axis, seconds in found.items():
            if axis in ("shard", "expert_shard", "dp"):
                room = behind / microbatches if layout.pp > 1 else behind
                found[axis] = max(seconds - room, seconds / (layers + 1))
            elif axis in CHUNKS:
                found[axis] = max(seconds - behind / 2, seconds / CHUNKS[axis])
            elif axis == "ring":
                found[axis] = max(seconds - behind / 4, seconds / layout.cp.ring)
        return found

    def _hop(self, layout: Layout, sent: Traffic) -> float:
        told = sent.get(("pp", "send"))
        if told is None or not told.calls:
            return 0.0
        return self._transfer("send", told.bytes / told.calls, ranks_of(layout, "pp")[:2])

    def _travel(self, kind: str, sent: float, ranks: tuple[int, ...]) -> float:
        return self.fabric.transfer(kind, sent, ranks).seconds


@dataclass(frozen=True)
class _Stage:
    """Seconds of a microbatch in a stage: forward, backward (recomputation too), the least of both, and those of the
    gradients that other stages wait for. products: of the backward pass's products alone, with their FLOPs.
    """

    forward: float = 0.0
    backward: float = 0.0
    least_forward: float = 0.0
    least_backward: float = 0.0
    inputs: float = 0.0
    flops: float = 0.0
    products: float = 0.0
    product_flops: float = 0.0

    def twice(self) -> "_Stage":
        """Return the stage whose backward pass is split: a product's two gradients are computed together, so both
        halves compute both.
        """
        return replace(
            self,
            backward=self.backward + self.products,
            least_backward=self.least_backward + self.products,
            flops=self.flops + self.product_flops,
        )

    def __add__(self, other: "_Stage") -> "_Stage":
        return _Stage(*(a + b for a, b in zip(self._values, other._values, strict=True)))

    def times(self, count: float) -> "_Stage":
        return _Stage(*(count * value for value in self._values))

    @property
    def _values(self) -> tuple[float, ...]:
        return (
            self.forward,
            self.backward,
            self.least_forward,
            self.least_backward,
            self.inputs,
            self.flops,
            self.products,
            self.product_flops,
        )


def _heavy(works: tuple[Work, ...]) -> tuple[Work, ...]:
    return tuple(work for work in works if work.kind != "stream")


def _gradients(work: LayerWork) -> tuple[Work, ...]:
    return tuple(one for one in work.backward if one.kind == "product")


def _inputs(work: LayerWork) -> tuple[Work, ...]:
    """Return what must be computed before the stage before can go on: all but the gradients of weights."""
    products = [one for one in work.backward if one.kind == "product"]
    return (*products[::2], *(one for one in work.backward if one.kind != "product"), *work.again)


def _places(layout: Layout, microbatches: int, stages: list[_Stage]) -> list[int]:
    """Return the places of a pipeline that may be the slowest: its ends, and the one that needs most at least."""
    slowest = max(range(layout.pp), key=lambda place: _floor(layout, microbatches, stages, place))
    return sorted({0, layout.pp - 1, slowest})


def _waits(layout: Layout, stages: list[_Stage], place: int) -> tuple[float, float]:
    """Return about how long a process waits for its first microbatch, and for the stages before after its last one."""
    if layout.pp > 1 and layout.schedule in ("zbv", "dualpipev"):
        # Nothing if forward, gradients of inputs and of weights take equally long (Qi et al. 2023, sec. 6).
        mean = sum(stages, start=_Stage()).times(1 / len(stages))
        uneven = mean.forward + mean.inputs - 2 * (mean.backward - mean.inputs)
        return (layout.pp - 1) * max(uneven, 0.1 * (mean.forward + mean.backward)), 0.0
    before = stages[: min(stage_numbers(layout, place))] if layout.pp > 1 else []
    fill = sum(stage.forward for stage in before)
    return fill, sum(stage.backward for stage in before)


def _floor_of(job: Job, stages: list[_Stage]) -> float:
    return max(_floor(job.layout, job.train.microbatches, stages, place) for place in range(job.layout.pp))


def _floor(layout: Layout, microbatches: int, stages: list[_Stage], place: int) -> float:
    """Return the seconds that a process needs whatever the network gives: its products one after the other, after
    those that bring it its first microbatch, and before those that its last one must still pass.
    """
    own = stage_numbers(layout, place) if layout.pp > 1 else [0]
    work = sum(stages[number].least_forward + stages[number].least_backward for number in own)
    before = stages[: min(own)]
    fill = sum(stage.least_forward for stage in before)
    drain = 0.0 if layout.schedule in ("zbv", "dualpipev") else sum(stage.least_backward for stage in before)
    return fill + microbatches * work + drain


@functools.lru_cache(maxsize=4096)
def _ranks(size: int, stride: int) -> tuple[int, ...]:
    return tuple(range(0, size * stride, stride))


def ranks_of(layout: Layout, axis: str) -> tuple[int, ...]:
    """Return the processes of the group of an axis that has process 0; see `layout.py` for the order."""
    tp, ulysses, ring, ep = layout.tp, layout.cp.ulysses, layout.cp.ring, layout.ep
    shard = layout.fsdp * layout.context
    groups = {
        "tp": (tp, 1),
        "ulysses": (ulysses, tp),
        "ulysses/ep": (ulysses, tp),
        "ring": (ring, tp * ulysses),
        "shard": (shard, tp),
        "ep": (ep, 1),
        "expert_shard": (shard * tp // ep, ep),
        "dp": (layout.dp, shard * tp),
        "pp": (layout.pp, layout.dp * shard * tp),
    }
    return _ranks(*groups[axis])
