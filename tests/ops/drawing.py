"""For every operator how its inputs are drawn, and how its promises are asked about: the table of test_promises.py.

A new operator needs an entry here; the test says so. An entry is a drawing function and what of `Drawing` is not as it
is for most operators.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liaoyuan import ops
from liaoyuan.ops.decoder_layer import few_bits_sample, layer_sample
from liaoyuan.ops.quantised_linear import Kind

Sample = tuple[Any, ...]


@dataclass(frozen=True)
class Draw:
    """What an input is drawn from: rows (any number), a width (1 and more), a dtype, and chance."""

    rows: int
    width: int
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator)

    def lengths(self, parts: int) -> list[int]:
        """Numbers, zeros among them, whose sum is that of the rows."""
        cuts = sorted(self.below(self.rows + 1, parts - 1).tolist())
        return [b - a for a, b in zip([0, *cuts], [*cuts, self.rows], strict=True)]


@dataclass(frozen=True)
class Drawing:
    """An operator's entry.

    draw: its inputs.
    public: the function that users call; arguments: its arguments, by name, for the operator's inputs.
    part: (inputs, units) -> the inputs of these units alone (rows, documents, sequences, tokens), in this order, and
        which of the rows of outputs and gradients are theirs. None: it has no rows of which one could be alone.
    rows: places of inputs that have rows like the outputs, whose gradients are compared row by row.
    units: how many there are.
    output_rows: places of outputs that have a row for each row.
    huge: rows of the largest draw.
    products: plain PyTorch with the same matrix products, for PyTorch's FLOP counter; None: the reference has them.
        share: of its FLOPs that the operator needs, forward and backward (a visible pair in all pairs; scores again).
    contiguous: names of inputs that must be contiguous, as the docstring says.
    memory: (inputs) -> a workload on which held scores or logits would show; None: its own.
    """

    draw: Callable[[Draw], Sample]
    public: Callable[..., Any]
    arguments: Callable[[Sample], dict[str, Any]] | None = None
    part: Callable[[Sample, Sequence[int]], tuple[Sample, Tensor]] | None = None
    rows: tuple[int, ...] = ()
    units: Callable[[Sample], int] = lambda sample: len(sample[0])
    output_rows: tuple[int, ...] = (0,)
    huge: int = 4099
    products: Callable[..., Any] | None = None
    share: Callable[[Sample], tuple[float, float]] = lambda sample: (1.0, 1.0)
    contiguous: tuple[str, ...] = ()
    memory: Callable[[torch.dtype], Sample] | None = None

    def named(self, sample: Sample) -> dict[str, Any]:
        if self.arguments is not None:
            return self.arguments(sample)
        return dict(zip(inspect.signature(self.public).parameters, sample, strict=False))


def rows_at(*places: int) -> Callable[[Sample, Sequence[int]], tuple[Sample, Tensor]]:
    """Return `part` for operators whose inputs at these places have a row for each row of the output."""

    def part(sample: Sample, units: Sequence[int]) -> tuple[Sample, Tensor]:
        chosen = torch.tensor(units)
        return tuple(x[chosen] if i in places and x is not None else x for i, x in enumerate(sample)), chosen

    return part


# ---- rows


def norm(d: Draw) -> Sample:
    return d.normal(d.rows, d.width), d.uniform(d.width).to(d.dtype) + 0.5, 1e-6


def add_norm(d: Draw) -> Sample:
    return d.normal(d.rows, d.width), *norm(d)


def swiglu(d: Draw) -> Sample:
    return (d.normal(d.rows, 2 * d.width),)


def split_rotary(d: Draw) -> Sample:
    heads, groups, dim = 1 + d.width % 3, 1 + d.width % 2, 2 * d.width
    angle = 6 * d.uniform(d.rows, d.width)
    # angles that the dtype has, since the reference rounds them
    angles = (angle.cos().to(d.dtype).float(), angle.sin().to(d.dtype).float())
    norms = [d.uniform(dim).to(d.dtype) + 0.5 if d.width % 4 else None for _ in range(2)]
    return d.normal(d.rows, heads * (groups + 2) * dim), *angles, heads, dim, *norms, 1e-6


def clamped_swiglu(d: Draw) -> Sample:
    return *swiglu(d), 2.0, 1.702


def latent_rotary(d: Draw) -> Sample:
    heads, own, value, turned = 1 + d.width % 3, d.width % 5, 1 + d.width % 4, 2 * d.width
    angle = 6 * d.uniform(d.rows, d.width)
    angles = (angle.cos().to(d.dtype).float(), angle.sin().to(d.dtype).float())  # as above
    query, expanded = d.normal(d.rows, heads * (own + turned)), d.normal(d.rows, heads * (own + value))
    return query, expanded, d.normal(d.rows, turned), *angles, heads


def loss_head(d: Draw) -> Sample:
    columns, first = 3 * d.width + 1, 5 * (d.width % 2)  # the whole vocabulary, or a part of it
    vocabulary = columns + 2 * first
    targets = d.below(vocabulary, d.rows)
    return d.normal(d.rows, d.width), 0.3 * d.normal(columns, d.width), targets, first, vocabulary, True, False


def loss_head_arguments(sample: Sample) -> dict[str, Any]:
    names = ("hidden", "weight", "targets", "first", "vocabulary", "moments")
    return dict(zip(names, sample, strict=False))


def many_targets(dtype: torch.dtype) -> Sample:
    weight = (0.05 * torch.randn(32768, 256)).to(dtype)
    return torch.randn(4096, 256).to(dtype), weight, torch.randint(len(weight), (4096,)), 0, len(weight), False, False


def head_product(hidden: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return hidden @ weight.t()


def linear(d: Draw) -> Sample:
    out = 2 * d.width + 3
    residual = d.normal(d.rows, out) if d.width % 3 else None
    return d.normal(d.rows, d.width), d.normal(out, d.width), d.normal(out) if d.width % 2 else None, residual


BITS: tuple[tuple[Kind, int | None, bool], ...] = (
    ("int8", None, True), ("int8", 32, True), ("int4", 32, False), ("int4", 64, True), ("fp8", None, True),
)  # fmt: skip


def quantised_linear(d: Draw) -> Sample:
    kind, group, symmetric = BITS[d.width % len(BITS)]
    weight = ops.quantise(torch.randn(11, 8 * d.width, generator=d.generator), kind, group, symmetric)
    bias = d.normal(11) if d.width % 2 else None
    return d.normal(d.rows, 8 * d.width), weight.data, weight.scales, weight.zeros, bias, kind, group or 0


def quantised_arguments(sample: Sample) -> dict[str, Any]:
    x, data, scales, zeros, bias, kind, group = sample
    weight = ops.QuantisedWeight(data, scales, zeros, kind, group or None, (len(data), x.shape[1]))
    return {"x": x, "weight": weight, "bias": bias}


def sample_tokens(d: Draw) -> Sample:
    vocabulary, ways = 5 * d.width + 1, torch.arange(d.rows)
    settings = ops.sampling_settings(
        d.rows, temperature=torch.tensor([1.0, 0.0, 0.5, 2.0])[ways % 4], top_k=torch.tensor([0, 3, 40])[ways % 3],
        top_p=torch.tensor([1.0, 0.75])[ways % 2], repetition=1.25, presence=0.5, frequency=0.25,
        uniform=(d.uniform(d.rows) * 2**20).floor() / 2**20,
    )  # fmt: skip
    history = d.below(vocabulary, d.rows, 7) - (d.uniform(d.rows, 7) < 0.1).long()
    mask = d.uniform(d.rows, vocabulary) < 0.7
    mask[:, 0] = True
    return 2 * d.normal(d.rows, vocabulary), settings, history, d.below(8, d.rows), ops.packed_mask(mask)


# ---- experts


def grouped_linear(d: Draw) -> Sample:
    sizes = torch.tensor(d.lengths(4))
    out = d.width + 2
    return d.normal(d.rows, d.width), d.normal(4, out, d.width), sizes, d.normal(4, out) if d.width % 2 else None


def some_rows_of_experts(sample: Sample, units: Sequence[int]) -> tuple[Sample, Tensor]:
    x, weight, sizes, bias = sample
    chosen = torch.tensor(sorted(units))
    expert = torch.arange(len(sizes)).repeat_interleave(sizes)[chosen]
    return (x[chosen], weight, torch.bincount(expert, minlength=len(sizes)), bias), chosen


def route(d: Draw) -> Sample:
    groups = 1 + d.width % 3
    experts, kept_groups = groups * (2 + d.width), (groups + 1) // 2
    scoring = "sigmoid" if d.width % 2 else "softmax"
    bias = 0.1 * d.normal(experts) if d.width % 2 else None
    kept = min(1 + d.width % 4, experts // groups * kept_groups)
    return 2 * d.normal(d.rows, experts), bias, kept, scoring, groups, kept_groups, 2, d.width % 5 > 0, 1.5


def route_arguments(sample: Sample) -> dict[str, Any]:
    names = ("logits", "bias", "kept", "scoring", "groups", "kept_groups", "group_best", "normalise", "scale")
    return dict(zip(names, sample, strict=True))


def permute_rows(d: Draw) -> Sample:
    return d.normal(d.rows, d.width), d.uniform(d.rows, 6).topk(1 + d.width % 3, -1).indices, 6


def combine_rows(d: Draw) -> Sample:
    per_token = 1 + d.width % 3
    order = torch.randperm(d.rows * per_token, generator=d.generator)
    return d.normal(d.rows * per_token, d.width), order, d.uniform(d.rows, per_token)


def some_tokens_rows(sample: Sample, units: Sequence[int]) -> tuple[Sample, Tensor]:
    rows, order, weights = sample
    chosen = torch.tensor(units)
    theirs = order.argsort().view(weights.shape)[chosen].flatten()
    return (rows[theirs], torch.arange(len(theirs)), weights[chosen]), chosen


# ---- attention


def attention(d: Draw, ones: bool = False) -> Sample:
    key_heads, groups = 1 + d.width % 2, 1 + d.width % 3
    dim, value_dim = 4 * d.width, 4 * d.width if d.width % 2 else 4 + 4 * (d.width // 2)
    lengths = [1] * d.rows if ones else d.lengths(5)
    window = 1 + d.width if d.width % 4 == 3 else None
    sinks = d.normal(key_heads * groups) if d.width % 5 == 0 else None
    return (
        d.normal(d.rows, key_heads * groups, dim),
        d.normal(d.rows, key_heads, dim),
        d.normal(d.rows, key_heads, value_dim),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        dim**-0.5,
        window,
        sinks,
    )


def some_documents(sample: Sample, units: Sequence[int]) -> tuple[Sample, Tensor]:
    query, key, value, boundaries, *rest = sample
    ranges = [torch.arange(int(boundaries[u]), int(boundaries[u + 1])) for u in units]
    chosen = torch.cat(ranges)
    ends = torch.tensor([0, *map(len, ranges)]).cumsum(0).to(torch.int32)
    return (query[chosen], key[chosen], value[chosen], ends, *rest), chosen


def all_pairs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(groups, 1))
    return torch.einsum("hqk,khd->qhd", scores, value.repeat_interleave(groups, 1))


def visible_share(sample: Sample) -> tuple[float, float]:
    """Of all pairs, those that see each other; backward computes the scores anew."""
    query, key, value, boundaries, _, *rest = sample
    window = rest[0] if rest and rest[0] else len(query)
    pairs = sum(min(place + 1, window) for length in boundaries.diff().tolist() for place in range(length))
    share = pairs / (len(query) * len(key))
    dims = query.shape[2], value.shape[2]
    return share, share * (3 * dims[0] + 2 * dims[1]) / (2 * dims[0] + 2 * dims[1])


def range_share(sample: Sample) -> tuple[float, float]:
    query, key, value, first, last, *_ = sample
    share = int((last - first).clamp_min(0).sum()) / (len(query) * len(key))
    dims = query.shape[2], value.shape[2]
    return share, share * (3 * dims[0] + 2 * dims[1]) / (2 * dims[0] + 2 * dims[1])


def block_attention(d: Draw) -> Sample:
    query, _, _, _, scale, *_ = attention(d)
    key_heads, keys = 1 + d.width % 2, 1 + 2 * d.width
    ends = d.below(keys + 1, 2, d.rows).sort(0).values
    first = ends[0].clamp_max(keys - 1)  # a key at least: what an empty range gives has a test of its own
    last = torch.maximum(ends[1], first + 1)
    key, value = d.normal(keys, key_heads, query.shape[2]), d.normal(keys, key_heads, 4 * d.width)
    return query, key, value, first, last, scale


def paged_attention(d: Draw, ones: bool = False) -> Sample:
    block, key_heads, groups = 1 + d.width % 17, 1 + d.width % 2, 1 + d.width % 3
    queries = [1] * d.rows if ones else [length for length in d.lengths(4) if length]
    lengths = queries if ones else [n + int(d.below(50, 1)) for n in queries]
    blocks = [-(-n // block) for n in lengths]
    tables = torch.zeros(len(lengths), max(blocks, default=1), dtype=torch.int32)
    for row, part in enumerate(torch.randperm(sum(blocks), generator=d.generator).to(torch.int32).split(blocks)):
        tables[row, : len(part)] = part
    dim = 4 * d.width
    caches = [d.normal(max(sum(blocks), 1), block, key_heads, dim) for _ in range(2)]
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    sinks = d.normal(key_heads * groups) if d.width % 5 == 0 else None
    query, window = d.normal(sum(queries), key_heads * groups, dim), 1 + d.width if d.width % 4 == 3 else None
    return query, *caches, tables, starts, torch.tensor(lengths, dtype=torch.int32), dim**-0.5, window, sinks


def some_sequences(sample: Sample, units: Sequence[int]) -> tuple[Sample, Tensor]:
    query, key_cache, value_cache, tables, starts, lengths, *rest = sample
    ranges = [torch.arange(int(starts[u]), int(starts[u + 1])) for u in units]
    chosen, places = torch.cat(ranges), torch.tensor(units)
    ends = torch.tensor([0, *map(len, ranges)]).cumsum(0).to(torch.int32)
    return (query[chosen], key_cache, value_cache, tables[places], ends, lengths[places], *rest), chosen


def write_cache(d: Draw) -> Sample:
    block, heads = 1 + d.width % 5, 1 + d.width % 3
    blocks = d.rows // block + 1
    slots = torch.randperm(blocks * block, generator=d.generator)[: d.rows]
    slots = torch.where(d.uniform(d.rows) < 0.1, -1, slots)
    caches = [d.normal(blocks, block, heads, dim) for dim in (d.width, d.width + 3)]
    return d.normal(d.rows, heads, d.width), d.normal(d.rows, heads, d.width + 3), *caches, slots


def decoder_layer(d: Draw, ones: bool = False) -> Sample:
    queries = [1] * d.rows if ones else [length for length in d.lengths(4) if length]
    lengths = queries if ones else [n + int(d.below(50, 1)) for n in queries]
    sizes = (3 * d.width + 5, 2 * d.width + 3, 1 + d.width % 2, 1 + d.width % 3, 2 * d.width)
    return layer_sample(queries, lengths, sizes, d.width % 3 > 0, d.dtype, d.generator)


def quantised_decoder_layer(d: Draw, ones: bool = False) -> Sample:
    return few_bits_sample(decoder_layer(d, ones), *BITS[d.width % len(BITS)])


def quantised_layer_arguments(sample: Sample) -> dict[str, Any]:
    names = list(inspect.signature(ops.quantised_decoder_layer).parameters)
    grouped = (*sample[:10], ops.LayerWeights(*sample[10:23]), ops.FewBits(*sample[23:27]), *sample[27:])
    return dict(zip(names, grouped, strict=True))


def some_sequences_of_a_layer(sample: Sample, units: Sequence[int]) -> tuple[Sample, Tensor]:
    residual, x, cosine, sine, keys, values, slots, tables, starts, lengths, *rest = sample
    ranges = [torch.arange(int(starts[u]), int(starts[u + 1])) for u in units]
    chosen, places = torch.cat(ranges), torch.tensor(units)
    ends = torch.tensor([0, *map(len, ranges)]).cumsum(0).to(torch.int32)
    stream = (residual[chosen], None if x is None else x[chosen], cosine[chosen], sine[chosen])
    return (*stream, keys, values, slots[chosen], tables[places], ends, lengths[places], *rest), chosen


# ---- whole tensors


def adamw_step(d: Draw) -> Sample:
    shape = (d.rows, d.width)
    first, second = torch.randn(shape, generator=d.generator), d.uniform(*shape)
    return d.normal(*shape), d.normal(*shape), first, second, [0.99, 1e-2, 0.1, 0.95, 0.05, 1.5, 1e-8], 77, 5


def adamw_arguments(sample: Sample) -> dict[str, Any]:
    weight, gradient, first, second, _, _, offset = sample
    lists = {"weights": weight, "gradients": gradient, "exp_avgs": first, "exp_avg_sqs": second}
    return {**{name: [x] for name, x in lists.items()}, "step": 3, "learning_rate": 1e-2, "offsets": [offset]}


def checksum(d: Draw) -> Sample:
    return (torch.randint(256, (d.rows * d.width,), dtype=torch.uint8, generator=d.generator),)


def square_sum(d: Draw) -> Sample:
    return (d.normal(d.rows, d.width),)


DRAWINGS: dict[str, Drawing] = {
    "rms_norm": Drawing(norm, ops.rms_norm, part=rows_at(0), rows=(0,)),
    "add_rms_norm": Drawing(add_norm, ops.add_rms_norm, part=rows_at(0, 1), rows=(0, 1), output_rows=(0, 1)),
    "swiglu": Drawing(swiglu, ops.swiglu, part=rows_at(0), rows=(0,)),
    "geglu": Drawing(lambda d: (*swiglu(d), d.width % 2 == 0), ops.geglu, part=rows_at(0), rows=(0,)),
    "clamped_swiglu": Drawing(clamped_swiglu, ops.clamped_swiglu, part=rows_at(0), rows=(0,)),
    "split_rotary": Drawing(split_rotary, ops.split_rotary, part=rows_at(0, 1, 2), rows=(0,), output_rows=(0, 1, 2)),
    "latent_rotary": Drawing(
        latent_rotary, ops.latent_rotary, part=rows_at(0, 1, 2, 3, 4), rows=(0, 1, 2), output_rows=(0, 1, 2)
    ),
    "loss_head": Drawing(
        loss_head, ops.logit_statistics, loss_head_arguments, part=rows_at(0, 2), rows=(0,),
        output_rows=(0, 1, 2, 3), products=head_product, memory=many_targets,
    ),
    "linear": Drawing(linear, ops.linear, part=rows_at(0, 3), rows=(0, 3)),
    "quantised_linear": Drawing(
        quantised_linear, ops.quantised_linear, quantised_arguments, part=rows_at(0), huge=1031
    ),
    "sample_tokens": Drawing(
        sample_tokens, ops.sample_tokens, part=rows_at(0, 1, 2, 3, 4), output_rows=(0, 1, 2), huge=1031
    ),
    "log_sum_exp": Drawing(lambda d: (d.normal(d.rows, 300 * d.width),), ops.log_sum_exp, part=rows_at(0)),
    "grouped_linear": Drawing(grouped_linear, ops.grouped_linear, part=some_rows_of_experts, rows=(0,)),
    "route": Drawing(route, ops.route, route_arguments, part=rows_at(0), rows=(0,), output_rows=(0, 1)),
    "permute_rows": Drawing(permute_rows, ops.permute_rows),  # copies
    "combine_rows": Drawing(
        combine_rows, ops.combine_rows, part=some_tokens_rows, rows=(2,), units=lambda sample: len(sample[2])
    ),
    "attention": Drawing(
        attention, ops.attention, part=some_documents, rows=(0, 1, 2), units=lambda sample: len(sample[3]) - 1,
        huge=1031, products=all_pairs, share=visible_share,
    ),
    "block_attention": Drawing(
        block_attention, ops.block_attention, part=rows_at(0, 3, 4), rows=(0,), output_rows=(0, 1), huge=1031,
        products=all_pairs, share=range_share,
    ),
    "paged_attention": Drawing(
        paged_attention, ops.paged_attention, part=some_sequences, units=lambda sample: len(sample[5]), huge=257,
        contiguous=("key_cache", "value_cache"),
    ),
    "write_cache": Drawing(write_cache, ops.write_cache, contiguous=("key_cache", "value_cache")),
    "decoder_layer": Drawing(
        decoder_layer, ops.decoder_layer, part=some_sequences_of_a_layer, units=lambda sample: len(sample[9]),
        output_rows=(0, 1), huge=257, contiguous=("key_cache", "value_cache", *ops.LayerWeights._fields),
    ),
    "quantised_decoder_layer": Drawing(
        quantised_decoder_layer, ops.quantised_decoder_layer, quantised_layer_arguments,
        part=some_sequences_of_a_layer, units=lambda sample: len(sample[9]), output_rows=(0, 1), huge=257,
        contiguous=("key_cache", "value_cache", *ops.LayerWeights._fields),
    ),
    "adamw_step": Drawing(
        adamw_step, ops.adamw_step, adamw_arguments, contiguous=("weight", "first", "second")
    ),
    "checksum": Drawing(checksum, ops.checksum, lambda sample: {}),
    "square_sum": Drawing(square_sum, ops.square_sum),
}  # fmt: skip
