"""What a process of a layout holds at its peak, by formulas, in less than a millisecond: to choose what to run dry.

`tests/compute/plan/test_bounds.py` holds them against dry runs: what lasts between steps to the byte, peaks within a
few percent. `FLOOR` is how far below the formula a dry run may come, for pruning.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.search.layer_terms import WIDE, Place, count, first_alike, kept, kind_of, passing, weights_of
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import Layout
from liaoyuan.parallel.fsdp import reduces_by_exchange
from liaoyuan.parallel.pipeline import cut_layers, stage_numbers

FLOOR = 0.85
BATCH_BYTES = 20  # of a token: itself and its position (int64), its weight (fp32)

Layers = tuple[tuple[int, bool, int], ...]  # the first layer that is like these, recomputed, how many


@dataclass(frozen=True)
class Memory:
    """Of the processes at one place of the pipeline, bytes at the peak.

    lasting: held between steps: weights, masters and moments. gathered: weights whole for the while. gradients: as they
    add up. activations: of all microbatches in flight. passing: of the layer that is at work, head included.
    """

    place: int
    lasting: int
    gathered: int
    gradients: int
    activations: int
    passing: int

    @property
    def peak(self) -> int:
        return self.lasting + self.gathered + self.gradients + self.activations + self.passing


def memory(job: Job) -> Memory:
    """Return the memory of the place in the pipeline that holds most; `job.layout` must be resolved."""
    return max((memory_at(job, place) for place in range(job.layout.pp)), key=lambda one: one.peak)


def tokens_of(job: Job) -> int:
    """Return the tokens of a microbatch that a process attends with: those of one data rank, cut by cp."""
    layout = job.layout
    return job.rows * job.sequence_length // (layout.dp * layout.fsdp) // job.train.microbatches // layout.context


@functools.lru_cache(maxsize=4096)
def stage_layers(config: ModelConfig, stages: int, recomputed: bool, every: int) -> tuple[Layers, ...]:
    """Return for each stage its layers by kind and by whether activations are computed again."""
    found, first = [], first_alike(config)
    for own in cut_layers(config, stages):
        kinds = Counter((first[layer], recomputed and number % every == 0) for number, layer in enumerate(own))
        found.append(tuple((layer, again, number) for (layer, again), number in kinds.items()))
    return tuple(found)


def layers_at(config: ModelConfig, layout: Layout, place: int) -> list[Layers]:
    """Return the layers of each stage of a process of the pipeline."""
    every = layout.recompute_every
    cut = stage_layers(config, layout.stages, layout.recompute != "none", every)
    return [cut[stage] for stage in (stage_numbers(layout, place) if layout.pp > 1 else [0])]


@dataclass(frozen=True)
class Held:
    """Numbers of weights of a process: its own parts, and whole (after tp, ep and pp have cut them)."""

    own: int
    whole: int
    root: int  # whole ones of the ends: embedding, last norm, head
    layer: int  # whole ones of the largest layer


def held_weights(config: ModelConfig, layout: Layout, place: int) -> Held:
    """Return how many weights a process of the pipeline holds."""
    shard = layout.fsdp * layout.context
    over = (layout.tp, layout.ep, shard, shard * layout.tp // layout.ep)
    sizes = weights_of(config)
    own = whole = largest = 0
    for layers in layers_at(config, layout, place):
        for layer, _, number in layers:
            part, full = count(sizes[kind_of(config, layer)], *over)
            own, whole, largest = own + number * part, whole + number * full, max(largest, full)
    root = 0
    for name in _ends(config, layout, place):
        part, full = count(sizes[name], *over)
        own, whole, root = own + part, whole + full, root + full
    return Held(own, whole, root, largest)


def _ends(config: ModelConfig, layout: Layout, place: int) -> Iterator[str]:
    stages = stage_numbers(layout, place) if layout.pp > 1 else [0]
    if 0 in stages:
        yield "embedding"
    if layout.stages - 1 in stages:
        yield from ("norm", "head")


def memory_at(job: Job, place: int) -> Memory:
    """Return the memory of a process at a place of the pipeline; `job.layout` must be resolved."""
    layout, config = job.layout, job.model
    weights = held_weights(config, layout, place)
    element = config.torch_dtype.itemsize
    terms = Place.of(config, layout, tokens_of(job), job.sequence_length)
    lasting = weights.own * (element + _optimiser_bytes(job, element))
    lasting += terms.tokens * layout.context * job.train.microbatches * BATCH_BYTES
    lasting += _mailboxes(layout, place) * job.train.microbatches * terms.own * config.hidden_size * element
    moment = _pipelined if layout.pp > 1 else _alone if job.processes == 1 else _sharded
    gathered, gradients, activations, now = moment(job, terms, weights, place)
    update = weights.own * WIDE  # gradients of the masters, when all else is gone
    if lasting + update > lasting + gathered + gradients + activations + now:
        gathered, gradients, activations, now = 0, update, 0, 0
    return Memory(place, lasting, gathered, gradients, activations, now)


def _mailboxes(layout: Layout, place: int) -> int:
    """Return from how many stages something arrives: each microbatch has memory of its own for it."""
    stages = stage_numbers(layout, place) if layout.pp > 1 else [0]
    neighbours = [other for stage in stages for other in (stage - 1, stage + 1)]
    # Zero-bubble schedules leave behind what their last stage has handed out.
    return sum(0 <= other < layout.stages for other in neighbours) + (layout.schedule == "zbv" and layout.pp > 1)


def _optimiser_bytes(job: Job, element: int) -> int:
    master = WIDE if element < WIDE and job.train.master_dtype == "float32" else 0
    moments = WIDE if job.train.optimiser == "muon" else 2 * WIDE
    return master + moments


def _alone(job: Job, terms: Place, weights: Held, place: int) -> tuple[int, int, int, int]:
    """One process: nothing is gathered; gradients add up in fp32 if there are several microbatches."""
    element = terms.element
    activations, now, head = _one_pass(job, terms, place)
    summed = weights.own * WIDE if job.train.microbatches > 1 else 0
    first = summed + activations + max(now, head)
    last = summed + weights.own * element + now
    if first >= last:
        return 0, summed, activations, max(now, head)
    return 0, summed + weights.own * element, 0, now


def _sharded(job: Job, terms: Place, weights: Held, place: int) -> tuple[int, int, int, int]:
    """FSDP without a pipeline: two layers are whole at a time, and the ends; one layer's gradient is under way."""
    element = terms.element
    activations, now, head = _one_pass(job, terms, place)
    several = job.train.microbatches > 1
    summed = weights.own * WIDE if several else 0
    way = element if reduces_by_exchange(job.layout, job.device) else WIDE
    gathered = (weights.root + 2 * weights.layer) * element
    reducing = weights.layer * (element + way)
    layers = job.model.num_hidden_layers
    moments = (
        (summed, activations, max(now, head)),  # the backward pass begins
        (summed, activations * (layers - 1) // layers, now + reducing),  # a layer's gradients are on their way
        (summed + weights.own * element, 0, now + reducing),  # it ends
    )
    return gathered, *max(moments, key=sum)


def _pipelined(job: Job, terms: Place, weights: Held, place: int) -> tuple[int, int, int, int]:
    """A pipeline: the stages are whole all the time, and so are the sums of their gradients."""
    layout, element = job.layout, terms.element
    way = element if reduces_by_exchange(layout, job.device) else WIDE
    sums = weights.whole * way
    flying = in_flight(layout, place, job.train.microbatches)
    stages, activations, now = stage_numbers(layout, place), 0, 0
    for stage, layers, number in zip(stages, layers_at(job.model, layout, place), flying, strict=True):
        activations += number * (_kept_by(terms, layers) + _ends_of_stage(terms, stage, layout.stages))
        now = max([now, *(passing(terms, kind_of(terms.model, layer)) for layer, _, _ in layers)])
    head = _head(terms) if layout.stages - 1 in stages else 0
    return weights.whole * element, sums, activations, max(now, head)


def in_flight(layout: Layout, place: int, microbatches: int) -> list[int]:
    """Return for each stage of a process how many microbatches' activations it holds at most, by the schedule."""
    size, last = layout.pp, layout.pp - 1 - place
    if layout.schedule == "gpipe":
        return [microbatches]
    if layout.schedule == "1f1b":
        return [min(microbatches, last + 1)]
    if layout.schedule == "interleaved":
        turn = microbatches // max(1, microbatches // size)
        forward = min(turn + 2 * last + 1, 2 * microbatches)
        first = sum(1 for step in range(forward) if step // turn % 2 == 0)
        return [first, forward - first]
    first = 2 * size - place - (layout.schedule == "zbv")
    return [min(microbatches, first), min(microbatches, place + 1)]


def _one_pass(job: Job, terms: Place, place: int) -> tuple[int, int, int]:
    """Return the bytes of a microbatch's activations, of a layer at work, and of the head at work."""
    (layers,) = layers_at(job.model, job.layout, place)
    activations = _kept_by(terms, layers) + _ends_of_stage(terms, 0, 1)
    now = max(passing(terms, kind_of(terms.model, layer)) for layer, _, _ in layers)
    return activations, now, _head(terms)


def _kept_by(terms: Place, layers: Layers) -> int:
    bare = replace(terms, recompute="none")
    return sum(number * kept(terms if again else bare, kind_of(terms.model, layer)) for layer, again, number in layers)


def _ends_of_stage(terms: Place, stage: int, stages: int) -> int:
    """Return the bytes that a stage keeps of a microbatch beside its layers."""
    stream, rotary = terms.own * terms.model.hidden_size * terms.element, terms.model.latent
    angles = terms.tokens * (rotary.qk_rope_head_dim if rotary else terms.model.head_dim) * WIDE
    last = stage == stages - 1
    return angles + stream * (2 if last else 1)


def _head(terms: Place) -> int:
    """Return the bytes of the last norm's gradient, the logits, and the gradient of the head."""
    model, tp = terms.model, terms.tp
    logits = terms.tokens * model.vocab_size // tp
    table = model.vocab_size * model.hidden_size // tp
    return (logits + table + math.ceil(terms.tokens * model.hidden_size)) * terms.element
