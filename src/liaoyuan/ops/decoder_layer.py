"""One layer of a dense decoder over a paged cache in one call: for decoding, where calls cost more than work.

It is the composition of the other operators of this room (norm, projection, rotary embedding, cache, attention, norm,
gated feed-forward layer), in their order and with their kernels, so it gives their bits. No gradient: training calls
them one by one. Projections of few bits have an operator of their own, so that whole ones need not carry what those
have more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liaoyuan.ops import choice
from liaoyuan.ops.gated import SWIGLU
from liaoyuan.ops.kernels import NATIVE
from liaoyuan.ops.linear import LINEAR
from liaoyuan.ops.norm import ADD_RMS_NORM, RMS_NORM
from liaoyuan.ops.operator import KERNEL_DTYPES, Operator, register
from liaoyuan.ops.paged_attention import PAGED_ATTENTION, WRITE_CACHE, sample_pages
from liaoyuan.ops.quantised_linear import QUANTISED_LINEAR, Kind, QuantisedWeight, quantise
from liaoyuan.ops.rotary import MAX_DIM, SPLIT_ROTARY
from liaoyuan.ops.shapes import takes_shapes

PARTS = (RMS_NORM, ADD_RMS_NORM, SPLIT_ROTARY, WRITE_CACHE, PAGED_ATTENTION, SWIGLU)  # beside the projections


class Pages(NamedTuple):
    """Where the new tokens of a layer go in the cache, and what they see: see `write_cache` and `paged_attention`."""

    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor
    block_tables: Tensor
    query_starts: Tensor
    lengths: Tensor


class LayerWeights(NamedTuple):
    """The weights of a layer: norms [H] (of heads [D]), projections [out, in] with their biases, sinks [Hq].

    `qkv` and `gate_up` have the rows that `split_rotary` and `swiglu` take.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    sinks: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @property
    def projections(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """The four weights with their biases, in the order in which they are used."""
        return (
            *((self.qkv, self.qkv_bias), (self.output, self.output_bias)),
            *((self.gate_up, self.gate_up_bias), (self.down, self.down_bias)),
        )


class FewBits(NamedTuple):
    """What `QuantisedWeight`s have beside the `data` that then stand as the projections of `LayerWeights`.

    scales, zeros: of the four, in the order of `projections`; zeros is empty if they have none. group: 0 if a whole
    output shares a scale.
    """

    scales: list[Tensor]
    zeros: list[Tensor]
    kind: str
    group: int

    @classmethod
    def of(cls, weights: Sequence[QuantisedWeight]) -> "FewBits":
        """Return that of four weights of one kind."""
        zeros = [one.zeros for one in weights if one.zeros is not None]
        return cls([one.scales for one in weights], zeros, weights[0].kind, weights[0].group or 0)


def layer_kernel(
    stream: Tensor, head_dim: int, has_few_bits: bool = False
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return a kernel with the arguments of `decoder_layer` if it does what the parts would do for a residual stream
    like this, and faster; else None. has_few_bits: with those of the operator `quantised_decoder_layer`, which takes
    `LayerWeights` and `FewBits` one by one.

    So it is where the kernels of this operator and of all its parts are in use: whoever chooses a part's reference, or
    compares operators, wants the parts. The kernel checks as much as safety of memory asks for, at no cost to speak of.
    """
    if not stream.is_cpu or stream.dtype not in KERNEL_DTYPES or head_dim > MAX_DIM or torch.is_grad_enabled():
        return None
    layer, product = (QUANTISED_DECODER_LAYER, QUANTISED_LINEAR) if has_few_bits else (DECODER_LAYER, LINEAR)
    if choice.is_watched() or any(
        choice.kernel_in_use(one.name, "cpu") != NATIVE.name for one in (*PARTS, product, layer)
    ):
        return None
    return layer.call


STREAM_AND_PAGES = {
    "residual": "float [N, H]",
    "x": "same [N, H]",
    "cosine": "float [N, D/2]",
    "sine": "float [N, D/2]",
    "key_cache": "same [B, block_size, Hk, D]",
    "value_cache": "same [B, block_size, Hk, D]",
    "slots": "int64 [N]",
    "block_tables": "int32 [S, _]",
    "query_starts": "int32 [_]",
    "lengths": "int32 [S]",
}


@takes_shapes(
    multiple=None,
    **STREAM_AND_PAGES,
    input_norm="same [H]",
    qkv="same [_, H]",
    qkv_bias="same [_]",
    query_norm="same [D]",
    key_norm="same [D]",
    sinks="float [Hq]",
    output="same [H, _]",
    output_bias="same [H]",
    post_norm="same [H]",
    gate_up="same [_, H]",
    gate_up_bias="same [_]",
    down="same [H, I]",
    down_bias="same [H]",
)
def decoder_layer(
    residual: Tensor,
    x: Tensor | None,
    cosine: Tensor,
    sine: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    input_norm: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    sinks: Tensor | None,
    output: Tensor,
    output_bias: Tensor | None,
    post_norm: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    scale: float,
    window: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return the residual stream after attention and the layer's last addend to it, both [N, H].

    Args:
        residual: [N, H], the stream; x: [N, H], the addend of the layer before, or None.
        cosine, sine: [N, D / 2] fp32, as `split_rotary` takes them.
        key_cache ... lengths: `Pages`; the new tokens' keys and values are written into the caches, in place.
        input_norm ... down_bias: `LayerWeights`, contiguous.
        scale, window: as those of `attention`. eps: of all norms.

    Raises:
        ShapeError: the shapes or dtypes do not fit.
    """
    arguments = (
        *(residual, x, cosine, sine, key_cache, value_cache, slots, block_tables, query_starts, lengths),
        *(input_norm, qkv, qkv_bias, query_norm, key_norm, sinks, output, output_bias, post_norm),
        *(gate_up, gate_up_bias, down, down_bias, scale, window, eps),
    )
    return _called(DECODER_LAYER, arguments)


@takes_shapes(multiple=None, **STREAM_AND_PAGES)
def quantised_decoder_layer(
    residual: Tensor,
    x: Tensor | None,
    cosine: Tensor,
    sine: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    weights: LayerWeights,
    bits: FewBits,
    scale: float,
    window: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return what `decoder_layer` does, of a layer whose projections have few bits.

    Args:
        residual ... lengths, scale, window, eps: as there.
        weights: contiguous, with the `data` of the projections; bits: what these have more.

    Raises:
        ShapeError: the shapes or dtypes do not fit.
    """
    arguments = (residual, x, cosine, sine, key_cache, value_cache, slots, block_tables, query_starts, lengths)
    return _called(QUANTISED_DECODER_LAYER, (*arguments, *weights, *bits, scale, window, eps))


def _called(operator: Operator, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    residual, _, cosine, _, key_cache, *_ = arguments
    is_known = cosine.dtype is torch.float32 and key_cache.shape[3] <= MAX_DIM
    function = operator.call if is_known and choice.takes(operator, residual) else operator.reference
    found: tuple[Tensor, Tensor] = function(*arguments)
    return found


Product = Callable[[Tensor], Tensor]  # of a projection: its input [N, K] -> its output [N, O]


def _decoder_layer(*arguments: Any) -> tuple[Tensor, Tensor]:
    weights = LayerWeights(*arguments[10:23])
    products = [partial(_whole_product, weight, bias) for weight, bias in weights.projections]
    return _composed(arguments[:4], Pages(*arguments[4:10]), weights, products, *arguments[23:])


def _quantised_decoder_layer(*arguments: Any) -> tuple[Tensor, Tensor]:
    weights, bits = LayerWeights(*arguments[10:23]), FewBits(*arguments[23:27])
    zeros: Sequence[Tensor | None] = bits.zeros or [None] * 4
    products = [
        partial(_quantised_product, data, *scales_and_zeros, bias, bits.kind, bits.group)
        for (data, bias), *scales_and_zeros in zip(weights.projections, bits.scales, zeros, strict=True)
    ]
    return _composed(arguments[:4], Pages(*arguments[4:10]), weights, products, *arguments[27:])


def _whole_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    found: Tensor = LINEAR.reference(x, weight, bias, None)
    return found


def _quantised_product(*weight_and_x: Any) -> Tensor:
    *weight, x = weight_and_x
    found: Tensor = QUANTISED_LINEAR.reference(x, *weight)
    return found


def _composed(
    stream: Sequence[Any],
    pages: Pages,
    weights: LayerWeights,
    products: Sequence[Product],
    scale: float,
    window: int | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The layer of the references of its parts; stream: residual, x, cosine, sine."""
    total, x, *angles = stream
    qkv, output, gate_up, down = products
    if x is None:
        x = RMS_NORM.reference(total, weights.input_norm, eps)
    else:
        total, x = ADD_RMS_NORM.reference(total, x, weights.input_norm, eps)
    heads, dim = pages.key_cache.shape[2:]
    norms = (weights.query_norm, weights.key_norm)
    query, key, value = SPLIT_ROTARY.reference(qkv(x), *angles, heads, dim, *norms, eps)
    WRITE_CACHE.reference(key, value, pages.key_cache, pages.value_cache, pages.slots)
    places = (pages.block_tables, pages.query_starts, pages.lengths)
    attended = PAGED_ATTENTION.reference(
        query, pages.key_cache, pages.value_cache, *places, scale, window, weights.sinks
    )
    total, x = ADD_RMS_NORM.reference(total, output(attended.flatten(1)), weights.post_norm, eps)
    return total, down(SWIGLU.reference(gate_up(x)))


def _fake(residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def layer_sample(
    queries: list[int],
    lengths: list[int],
    sizes: tuple[int, int, int, int, int],
    with_extras: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Any, ...]:
    """Return inputs for sequences with so many new tokens and so many in all.

    sizes: hidden, intermediate, key-value heads, query heads of each, head dimension. with_extras: addend, biases,
    QK-norm, a window and sinks.
    """
    hidden, intermediate, heads, groups, dim = sizes

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    def projection(out: int, width: int) -> tuple[Tensor, Tensor | None]:
        return normal(out, width, scale=width**-0.5), normal(out, scale=0.1) if with_extras else None

    def norm(size: int) -> Tensor:
        return (torch.rand(size, generator=generator) + 0.5).to(dtype)

    rows, ends = sum(queries), torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    tables, *caches = sample_pages(lengths, heads, (dim, dim), dtype, generator)
    owner = torch.arange(len(queries)).repeat_interleave(torch.tensor(queries, dtype=torch.long))
    position = torch.arange(rows) + (torch.tensor(lengths, dtype=torch.long) - ends[1:])[owner]
    slots = tables[owner, position // 16].long() * 16 + position % 16
    angle = torch.randn(rows, dim // 2, generator=generator)
    angles = [f(angle).to(dtype).float() for f in (torch.cos, torch.sin)]  # bf16 angles, as in split_rotary's samples
    norms = [norm(dim) if with_extras else None for _ in range(2)]
    weights = (
        *(norm(hidden), *projection((groups + 2) * heads * dim, hidden), *norms),
        *(normal(heads * groups) if with_extras else None, *projection(hidden, heads * groups * dim), norm(hidden)),
        *(*projection(2 * intermediate, hidden), *projection(hidden, intermediate)),
    )
    stream = (normal(rows, hidden), normal(rows, hidden) if with_extras else None, *angles)
    places = (slots, tables, ends, torch.tensor(lengths, dtype=torch.int32))
    return *stream, *caches, *places, *weights, dim**-0.5, 20 if with_extras else None, 1e-6


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(17)
    yield layer_sample([1, 1, 1], [5, 40, 1], (48, 40, 2, 2, 16), False, dtype, generator)
    yield layer_sample([1, 30], [70, 33], (64, 96, 1, 3, 32), True, dtype, generator)


def few_bits_sample(
    sample: tuple[Any, ...], kind: Kind, group: int | None = None, symmetric: bool = True
) -> tuple[Any, ...]:
    """Return a sample of `decoder_layer` as one of `quantised_decoder_layer`, its projections quantised."""
    weights = LayerWeights(*sample[10:23])
    parts = [quantise(weight, kind, group, symmetric) for weight, _ in weights.projections]
    names = ("qkv", "output", "gate_up", "down")
    weights = weights._replace(**{name: part.data for name, part in zip(names, parts, strict=True)})
    return (*sample[:10], *weights, *FewBits.of(parts), *sample[23:])


def _quantised_samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    plain, more = _samples(dtype)
    yield few_bits_sample(plain, "int8")
    yield few_bits_sample(more, "int4", 32, symmetric=False)
    yield few_bits_sample(more, "fp8")


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    """One token of a sequence of 256, in a layer of a model of 120 million weights."""
    return layer_sample([1], [256], (768, 2304, 4, 3, 64), False, dtype, torch.Generator().manual_seed(0))


def _seen(pages: Pages, window: int | None) -> int:
    """Return the tokens that a query sees if every table is full, as `paged_attention` counts."""
    tokens = pages.block_tables.shape[1] * pages.key_cache.shape[1]
    return min(tokens, window) if window else tokens


def _flops(residual: Tensor, *arguments: Any) -> int:
    """The products with the weights, and those of attention as its own formula counts them. Of few bits the inputs are
    packed, so that only outputs are read off the weights.
    """
    pages, weights = Pages(*arguments[3:9]), LayerWeights(*arguments[9:22])
    merged, pairs = len(weights.qkv), len(weights.gate_up)
    queries = merged - 2 * pages.key_cache.shape[2:].numel()
    size = residual.shape[1] * (merged + queries + pairs + pairs // 2)
    return 2 * len(residual) * (size + 2 * queries * _seen(pages, arguments[-2]))


def _traffic(residual: Tensor, *arguments: Any) -> int:
    pages, weights, more = Pages(*arguments[3:9]), arguments[9:22], arguments[22:-3]
    token = 2 * pages.key_cache[0, 0].numel() * residual.element_size()
    read = len(pages.block_tables) * _seen(pages, arguments[-2]) * token + len(residual) * token
    parts = [*weights, *(part for parts in more if isinstance(parts, list) for part in parts)]
    return read + 4 * residual.nbytes + sum(part.nbytes for part in parts if part is not None)


def _schema(bits: str = "") -> str:
    """bits: the arguments of projections of few bits."""
    return (
        "(Tensor residual, Tensor? x, Tensor cosine, Tensor sine, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slots, Tensor block_tables, Tensor query_starts, Tensor lengths, Tensor input_norm, Tensor qkv, "
        "Tensor? qkv_bias, Tensor? query_norm, Tensor? key_norm, Tensor? sinks, Tensor output, Tensor? output_bias, "
        f"Tensor post_norm, Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, {bits}float scale, "
        "int? window, float eps) -> (Tensor, Tensor)"
    )


DECODER_LAYER = register(
    Operator(
        name="decoder_layer",
        kernels=(NATIVE,),
        schema=_schema(),
        reference=_decoder_layer,
        fake=_fake,
        samples=_samples,
        workload=_workload,
        flops=_flops,
        traffic=_traffic,
        tolerance={torch.float32: 1e-4, torch.bfloat16: 5e-2},  # of seven operators, each of which rounds
    )
)

QUANTISED_DECODER_LAYER = register(
    replace(
        DECODER_LAYER,
        name="quantised_decoder_layer",
        schema=_schema("Tensor[] scales, Tensor[] zeros, str kind, int group, "),
        reference=_quantised_decoder_layer,
        samples=_quantised_samples,
        workload=lambda dtype: few_bits_sample(_workload(dtype), "int8"),
    )
)
