"""What one process of a layout sends in the forward and backward passes of a step, as formulas.

It is what `traffic.py` measures: `tests/parallel/test_traffic.py` holds the two together, call by call. Shapes of
weights are read off the model itself, made without memory. With `layout.overlap` tokens travel in chunks: the same
bytes in more calls, once more the counts of experts' rows, and one more sum for each layer that is recomputed. Layouts
that are `exact` send as much for their layers, but gather the head, which is not counted here.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import Placement

from liaoyuan.models import Decoder, ModelConfig
from liaoyuan.parallel.fsdp import reduces_by_exchange
from liaoyuan.parallel.layout import Layout
from liaoyuan.parallel.pipeline import HEAD, cut_layers, process_of, stage_numbers, stage_with
from liaoyuan.parallel.tensor import COLUMNS, ROWS, is_uncut, placement
from liaoyuan.parallel.traffic import COUNTS, Sent, Traffic, common_name, sent_bytes

COUNT_BYTES = 8  # of a number of rows, int64
WIDE_BYTES = 4  # sums are made in fp32 at least


def closed_form(
    layout: Layout,
    config: ModelConfig,
    tokens: int,
    microbatches: int,
    element: int,
    place: int = 0,
    device: str = "cpu",
) -> Traffic:
    """Return what a process sends in one step, by axis and collective; without the optimiser's few numbers.

    Args:
        layout: resolved.
        tokens: of a microbatch, at one data rank (the processes of cp and tp together).
        microbatches: of a step, at one data rank.
        element: bytes of an element of weights and activations.
        place: the process's number along pp.
        device: its kind, which decides how FSDP reduces gradients.

    Returns:
        Expert rows are those of a router that loads all experts equally; all else is exact.
    """
    exchanges = reduces_by_exchange(layout, device)
    count = _Count(layout, config, tokens, microbatches, element, place, exchanges)
    _weights(count)
    for layer, again in count.layers():
        _tensor_parallel(count, layer, again)
        _ulysses(count, again)
        _ring(count, again)
        _experts(count, layer, again)
    _ends(count)
    _pipeline(count)
    return count.traffic


@dataclass
class _Count:
    """The sum under way, and the sizes of which it is made."""

    layout: Layout
    config: ModelConfig
    tokens: int
    microbatches: int
    element: int
    place: int
    exchanges: bool
    traffic: Traffic = field(default_factory=dict)

    def add(self, axis: str, size: int, collective: str, calls: int, given: int) -> None:
        """Count collectives along an axis of `size` processes in which this one puts `given` bytes a call."""
        if size > 1 and calls:
            key = common_name(self.layout, axis), collective
            sent = Sent(calls, calls * sent_bytes(collective, given, size))
            self.traffic[key] = self.traffic.get(key, Sent()) + sent

    def layers(self) -> Iterator[tuple[int, bool]]:
        """Yield the layers of this process, and whether their activations are computed again."""
        layout = self.layout
        for stage in self.stages:
            for number, layer in enumerate(self.cut[stage]):
                yield layer, layout.recompute != "none" and number % layout.recompute_every == 0

    @property
    def cut(self) -> list[range]:
        """The layers of each stage of the pipeline."""
        return cut_layers(self.config, self.layout.stages)

    @property
    def stages(self) -> list[int]:
        """The stages of this process."""
        return stage_numbers(self.layout, self.place) if self.layout.pp > 1 else [0]

    @property
    def wide(self) -> int:
        """Bytes of an element of a sum."""
        return max(WIDE_BYTES, self.element)

    @property
    def rows(self) -> int:
        """Rows of a microbatch in the processes of tp together."""
        return self.tokens // self.layout.context

    @property
    def shard(self) -> int:
        """Over how many processes FSDP cuts dense weights."""
        return self.layout.fsdp * self.layout.context

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads, of one process of tp."""
        return self.config.num_attention_heads // self.layout.tp, self.config.num_key_value_heads // self.layout.tp


def _weights(count: _Count) -> None:
    """FSDP: each unit is gathered for the forward and for the backward pass of each microbatch, the root once for
    both, and its gradient reduced, wide, or exchanged as it is (reduction.py); replicas then add their shards up. In a
    pipeline a step does all this once, whatever its microbatches. Tensor parallelism adds up the shards of gradients
    of weights that it does not cut, wide and all at once.
    """
    layout = count.layout
    piped = layout.pp > 1
    times = 1 if piped else count.microbatches
    uncut = 0
    for unit, shapes in _units(count).items():
        axis = "expert_shard" if unit.endswith("experts") else "shard"
        size = count.shard * layout.tp // layout.ep if axis == "expert_shard" else count.shard
        part = sum(math.ceil(shape[0] / size) * math.prod(shape[1:]) for _, shape in shapes)  # padded
        gathers = times if piped or unit.startswith("root") else 2 * times
        count.add(axis, size, "all-gather", gathers, part * count.element)
        if count.exchanges:
            count.add(axis, size, "all-to-all", times, part * size * count.element)
        else:
            count.add(axis, size, "reduce-scatter", times, part * size * count.wide)
        count.add("dp", layout.dp, "all-reduce", times, part * count.wide)
        for name, shape in shapes:
            if axis == "shard" and _uncut(name):
                uncut += math.ceil(shape[0] / size) * math.prod(shape[1:])
    count.add("tp", layout.tp, "all-reduce", times, uncut * count.wide)


def _units(count: _Count) -> dict[str, list[tuple[str, Sequence[int]]]]:
    """Return the weights that FSDP gathers together, names and shapes after tp and ep have cut them."""
    layout, cut = count.layout, count.cut
    units: dict[str, list[tuple[str, Sequence[int]]]] = {}
    for stage in count.stages:
        for layer in cut[stage]:
            for part, weights in _parts(count.config)[layer].items():
                units[f"layers.{layer}{part}"] = [(one.name, one.cut(layout)) for one in weights]
        ends = [one for one in _parts(count.config)[ENDS][""] if stage_with(one.name, cut) == stage]
        if layout.pp > 1 and count.config.tie_word_embeddings and stage == layout.stages - 1:
            ends.append(_Weight(HEAD, (count.config.vocab_size, count.config.hidden_size), ROWS))
        if ends:
            units[f"root of stage {stage}"] = [(one.name, one.cut(layout)) for one in ends]
    return units


_uncut = functools.cache(is_uncut)
ENDS = -1  # in the place of a layer's number: embedding, last norm, head


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, ...]
    placed: Placement | None  # by tp; None: by ep

    def cut(self, layout: Layout) -> list[int]:
        """Return its shape in a process of tp or ep."""
        shape = list(self.shape)
        if self.placed is None:
            shape[0] //= layout.ep
        elif self.placed in (ROWS, COLUMNS):
            shape[0 if self.placed == ROWS else 1] //= layout.tp
        return shape


@functools.cache
def _parts(config: ModelConfig) -> dict[int, dict[str, list[_Weight]]]:
    """Return for each layer, and for the ends, its weights: "" those that FSDP gathers with it, and ".experts"."""
    with torch.device("meta"):
        weights = [(name, tuple(weight.shape)) for name, weight in Decoder(config).named_parameters()]
    parts: dict[int, dict[str, list[_Weight]]] = {ENDS: {"": []}}
    for name, shape in weights:
        experts = ".experts." in name
        layer = int(name.split(".")[1]) if name.startswith("layers.") else ENDS
        one = _Weight(name, shape, None if experts else placement(name))
        parts.setdefault(layer, {}).setdefault(".experts" if experts else "", []).append(one)
    return parts


def _tensor_parallel(count: _Count, layer: int, again: bool) -> None:
    """Rows are gathered before attention and dense feed-forward, their sums scattered after it; the backward pass
    does the reverse. Recomputation stops at the last thing that the backward pass needs, which is not the last sum.
    """
    layout, blocks = count.layout, 1 if count.config.is_sparse(layer) else 2
    whole = count.rows * count.config.hidden_size * count.element
    summed_again = blocks - (blocks == 2 and not count.config.post_norms)
    gathers, scatters = 2 * blocks + again * blocks, 2 * blocks + again * summed_again
    count.add("tp", layout.tp, "all-gather", count.microbatches * gathers, whole // layout.tp)
    count.add("tp", layout.tp, "reduce-scatter", count.microbatches * scatters, whole)


def _ulysses(count: _Count, again: bool) -> None:
    """Queries, keys and values change place in one exchange, the output in another; their gradients likewise."""
    size, config = count.layout.cp.ulysses, count.config
    query, key = count.heads
    key = math.lcm(key, size)  # repeated until they can be shared out
    there = query * config.head_dim + key * (config.head_dim + config.value_head_dim)
    calls = count.microbatches * (2 + again)
    for width in (there, query * config.value_head_dim):
        count.add("ulysses", size, "all-to-all", calls, count.rows * width * count.element)


def _ring(count: _Count, again: bool) -> None:
    """Keys and values make R - 1 hops in each pass; their gradients, wide, as many until they are home."""
    layout, config = count.layout, count.config
    size = layout.cp.ring
    heads = math.lcm(count.heads[1], layout.cp.ulysses) // layout.cp.ulysses
    hops = count.microbatches * (size - 1)
    for dim in (config.head_dim, config.value_head_dim):
        elements = count.tokens // size * heads * dim
        count.add("ring", size, "send", (2 + again) * hops, elements * count.element)
        count.add("ring", size, "send", hops, elements * count.wide)


def _experts(count: _Count, layer: int, again: bool) -> None:
    """Each process says how many rows come; then rows go to their experts and back, and their gradients."""
    layout, experts = count.layout, count.config.experts
    if experts and count.config.is_sparse(layer):
        rows = count.rows // layout.tp * experts.num_experts_per_tok
        row = count.config.hidden_size * count.element
        counts, calls = count.microbatches * (1 + again), count.microbatches * (4 + 2 * again)
        count.add("ep", layout.ep, COUNTS, counts, experts.num_experts * COUNT_BYTES)
        count.add("ep", layout.ep, "all-to-all", calls, rows * row)


def _ends(count: _Count) -> None:
    """With a vocabulary cut by tp: the embedding is a sum that is scattered, the head gathers rows; of each token the
    highest log-sum-exp is reduced, then the sum of exponentials and the chosen logit together.
    """
    layout, microbatches = count.layout, count.microbatches
    whole = count.rows * count.config.hidden_size * count.element
    for there in (0 in count.stages, layout.stages - 1 in count.stages):
        count.add("tp", layout.tp, "all-gather", there * microbatches, whole // layout.tp)
        count.add("tp", layout.tp, "reduce-scatter", there * microbatches, whole)
    if layout.stages - 1 in count.stages:
        count.add("tp", layout.tp, "all-reduce", microbatches, count.rows * count.wide)
        count.add("tp", layout.tp, "all-reduce", microbatches, 2 * count.rows * count.wide)


def _pipeline(count: _Count) -> None:
    """Each stage hands the residual stream on, and its gradient back, unless the other stage is here as well. The
    first sends a tied embedding to the last once a step, and the last its gradient back.
    """
    layout = count.layout
    stream = count.rows // layout.tp * count.config.hidden_size * count.element
    for stage in count.stages:
        for other in (stage - 1, stage + 1):
            if 0 <= other < layout.stages and process_of(layout, other) != count.place:
                count.add("pp", layout.pp, "send", count.microbatches, stream)
    ends = process_of(layout, 0), process_of(layout, layout.stages - 1)
    if count.config.tie_word_embeddings and ends[0] != ends[1] and count.place in ends:
        rows = math.ceil(count.config.vocab_size // layout.tp / count.shard)
        count.add("pp", layout.pp, "send", 1, rows * count.config.hidden_size * count.element)
