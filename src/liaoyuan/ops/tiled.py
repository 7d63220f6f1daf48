"""Kernels whose one merit is exactness: PyTorch's own operators, in shapes for which a row's bits depend on it alone.

PyTorch's products choose the order of summation by the shape of the whole, its element-wise functions compute the last
few elements in another way than the rest, and a long row that is alone is cut between threads. So here products have
tiles of one shape, filled up with zeros; attention walks over blocks of keys, counted from a sequence's first token;
and functions are put together from those that give an element the same bits wherever it stands. Where a reference
does all that, it is used as it is. Gradients are the references'.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.gated import pairs
from liaoyuan.ops.log_sum_exp import row_sum
from liaoyuan.ops.operator import KERNEL_DTYPES, OPERATORS, wide

TILE = 32  # rows of a product, and what its columns are a multiple of: of fewer, MKL sums some rows in another order
KEYS = 128  # that attention takes at a time


# ---- products


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias, [N, K] and [O, K] -> [N, O], in tiles of 32 rows."""
    whole = len(weight) // TILE * TILE
    columns = [(weight[:whole], None if bias is None else bias[:whole])]
    if whole < len(weight):
        columns.append((filled(weight[whole:]), None if bias is None else filled(bias[whole:])))
    tiles = [torch.cat([F.linear(rows, *part) for part in columns], 1) for rows in filled(x).split(TILE)]
    return torch.cat(tiles)[: len(x), : len(weight)].contiguous()


def filled(x: Tensor, multiple: int = TILE) -> Tensor:
    """Return a copy of x with so many rows of zeros behind it that their number is a multiple of this."""
    copy = x.new_zeros(-(-len(x) // multiple) * multiple, *x.shape[1:])
    copy[: len(x)] = x
    return copy


@functools.cache
def check() -> None:
    """Raise LiaoyuanError if PyTorch's product gives a row of a tile other bits at another place of it."""
    generator = torch.Generator().manual_seed(0)
    for dtype in KERNEL_DTYPES:
        for width, out in ((24, 40), (64, 8), (600, 97), (1500, 128)):
            x, weight = (torch.randn(rows, width, generator=generator).to(dtype) for rows in (TILE, out))
            whole = product(x, weight)
            for chosen in (torch.arange(TILE).flip(0), torch.arange(3, TILE), torch.tensor([TILE - 1])):
                if not torch.equal(product(x[chosen], weight), whole[chosen]):
                    raise LiaoyuanError("PyTorch's products on this machine are not exact in tiles either.")


linear = functools.partial(OPERATORS["linear"].reference, product=product)
grouped_linear = functools.partial(OPERATORS["grouped_linear"].reference, product=product)
quantised_linear = functools.partial(OPERATORS["quantised_linear"].reference, product=product)


# ---- attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each document by itself."""
    out = query.new_empty(*query.shape[:2], value.shape[2])
    log_sum_exp = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    ends = boundaries.tolist()
    for start, end in itertools.pairwise(ends):
        rows = slice(start, end)
        if start < end:
            found = _attended(query[rows], key[rows], value[rows], scale, window, sinks)
            out[rows], log_sum_exp[:, rows] = found
    return out, log_sum_exp


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend each sequence by itself, its keys and values taken out of the cache."""
    out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    starts = query_starts.tolist()
    for sequence, length in enumerate(lengths.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start < rows.stop:
            blocks = block_tables[sequence, : -(-length // key_cache.shape[1])].long()
            key, value = (cache[blocks].flatten(0, 1)[:length] for cache in (key_cache, value_cache))
            out[rows] = _attended(query[rows], key, value, scale, window, sinks)[0]
    return out


def _attended(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the attention of a sequence's last Q tokens over all L, fp32 [Q, Hq, Dv], and log-denominators [Hq, Q].

    The rows of a tile are queries of all heads that share a key, so that few tokens fill it.
    """
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    keys, values = _key_blocks(key), _key_blocks(F.pad(value, (0, -value.shape[2] % TILE)))
    rows = filled(query.float().unflatten(1, (heads, groups)).transpose(1, 2).flatten(0, 1))  # [Q * G, Hk, D]
    first = len(key) - len(query)
    places = (first + torch.arange(len(rows)) // groups).clamp_max(len(key) - 1)
    heights = None if sinks is None else sinks.float().view(heads, groups).t().repeat(len(rows) // groups + 1, 1)
    found = [
        _tile(rows[tile], places[tile], keys, values, scale, window, None if heights is None else heights[tile])
        for tile in torch.arange(len(rows)).split(TILE)
    ]
    out, log_sum_exp = (torch.cat(parts, 1)[:, : len(query) * groups] for parts in zip(*found, strict=True))
    out = out[..., : value.shape[2]].unflatten(1, (-1, groups))  # [Hk, Q, G, Dv]
    return out.permute(1, 0, 2, 3).flatten(1, 2), log_sum_exp.unflatten(1, (-1, groups)).mT.flatten(0, 1)


def _key_blocks(x: Tensor) -> Tensor:
    """Return keys or values [L, H, D] as fp32 [blocks, H, KEYS, D], filled up with zeros."""
    return filled(x.float(), KEYS).unflatten(0, (-1, KEYS)).transpose(1, 2).contiguous()


def _tile(
    query: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the attention of rows [TILE, Hk, D] at these places of a sequence, and its log-denominators.

    A block that a row does not see adds zeros to it, so it does not matter which blocks its tile walks over.
    """
    query = query.transpose(0, 1).contiguous()
    start = max(int(places[0]) - window + 1, 0) // KEYS if window else 0
    blocks = range(start, int(places[-1]) // KEYS + 1)
    scores = torch.cat([torch.bmm(query, keys[block].mT) for block in blocks], -1) * scale
    behind = places[:, None] - torch.arange(start * KEYS, blocks.stop * KEYS)
    scores.masked_fill_((behind < 0) | (behind >= window) if window else behind < 0, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        peak = peak.maximum(sinks.t()[..., None])
    total = torch.zeros_like(peak) if sinks is None else (sinks.t()[..., None] - peak).exp()
    out = query.new_zeros(*query.shape[:2], values.shape[3])
    for block, part in zip(blocks, (scores - peak).exp_().split(KEYS, -1), strict=True):
        weights = part.contiguous()
        total += weights.sum(-1, keepdim=True)
        out += torch.bmm(weights, values[block])
    return out / total, (total.log() + peak).squeeze(-1)


# ---- sums over the vocabulary


def row_log_sum_exp(scores: Tensor) -> Tensor:
    """Return log(sum(exp(scores))) of each row of [R, V], summed in blocks."""
    peak = scores.amax(-1, keepdim=True)
    peak = peak.where(peak.isfinite(), 0.0)
    return row_sum((scores - peak).exp_()).log() + peak.squeeze(-1)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Return what `row_log_sum_exp` does, in fp32."""
    return row_log_sum_exp(wide(logits))


loss_head = functools.partial(OPERATORS["loss_head"].reference, product=product, log_sum_exp=row_log_sum_exp)
sample_tokens = functools.partial(OPERATORS["sample_tokens"].reference, log_sum_exp=row_log_sum_exp)


# ---- functions of an element


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + (-x).exp())


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = pairs(wide(gate_up))
    return (gate * sigmoid(gate) * up).to(gate_up.dtype)


def geglu(gate_up: Tensor, approximate: bool) -> Tensor:
    gate, up = pairs(wide(gate_up))
    if approximate:
        share = (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)).tanh()
    else:
        share = (gate * math.sqrt(0.5)).erf()
    return (0.5 * gate * (1 + share) * up).to(gate_up.dtype)


def clamped_swiglu(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    gate, up = pairs(wide(gate_up))
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * sigmoid(alpha * gate)).to(gate_up.dtype)


route = functools.partial(OPERATORS["route"].reference, sigmoid=sigmoid)


# ---- references that are exact: rows of elements that are moved, added and multiplied, and sums of a short row

rms_norm = OPERATORS["rms_norm"].reference
add_rms_norm = OPERATORS["add_rms_norm"].reference
split_rotary = OPERATORS["split_rotary"].reference
latent_rotary = OPERATORS["latent_rotary"].reference
permute_rows = OPERATORS["permute_rows"].reference
combine_rows = OPERATORS["combine_rows"].reference
write_cache = OPERATORS["write_cache"].reference
