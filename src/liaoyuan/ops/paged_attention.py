"""Causal attention over a paged key-value cache (decode and chunked prefill in one batch), and writing to the cache.

Paged cache: Kwon et al. 2023 (arXiv 2309.06180, sec. 4.1).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, TILED, triton
from liaoyuan.ops.operator import Operator, register
from liaoyuan.ops.shapes import ShapeError, takes_shapes


@takes_shapes(
    query="float [N, Hq, D]",
    key_cache="same [B, block_size, Hk, D]",
    value_cache="same [B, block_size, Hk, Dv]",
    block_tables="int32 [S, _]",
    query_starts="int32 [_]",
    lengths="int32 [S]",
    sinks="float [Hq]",
    multiple=("Hq", "Hk"),
)
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
    """Return the attention of each sequence's newest tokens over all of its cached tokens.

    Args:
        query: [N, Hq, D], the sequences' new tokens one after another.
        key_cache: [B, block_size, Hk, D]; value_cache: [B, block_size, Hk, Dv]. The new tokens are already in both.
        block_tables: int32 [S, max_blocks], the cache blocks of each sequence in order.
        query_starts: int32 [S + 1], sequence s owns query rows query_starts[s] to query_starts[s + 1].
        lengths: int32 [S], cached tokens of each sequence, the new ones included.
        scale, window, sinks: as those of `attention`.

    Returns:
        [N, Hq, Dv] in the dtype of query. Rows after query_starts[S] are zero.
    """
    if query_starts.shape[0] != lengths.shape[0] + 1:
        shapes = f"query_starts {list(query_starts.shape)} and lengths {list(lengths.shape)}"
        raise ShapeError(f"paged_attention: {shapes} do not fit: [S + 1] and [S].")
    arguments = (query, key_cache, value_cache, block_tables, query_starts, lengths, scale, window, sinks)
    if takes(PAGED_ATTENTION, query, key_cache, value_cache):
        return PAGED_ATTENTION.call(*arguments)
    return _paged_attention(*arguments)


@takes_shapes(
    key="float [N, Hk, D]",
    value="same [N, Hk, Dv]",
    key_cache="same [B, block_size, Hk, D]",
    value_cache="same [B, block_size, Hk, Dv]",
    slots="int64 [N]",
)
def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Write new keys and values into the cache, in place.

    Args:
        key: [N, Hk, D]; key_cache: [B, block_size, Hk, D]; value: [N, Hk, Dv]; value_cache: [B, block_size, Hk, Dv].
            All of one dtype.
        slots: int64 [N], each row's place block * block_size + offset; a negative one is skipped.
    """
    if takes(WRITE_CACHE, key, value, key_cache, value_cache):
        WRITE_CACHE.call(key, value, key_cache, value_cache, slots)
    else:
        _write_cache(key, value, key_cache, value_cache, slots)


def _paged_attention(
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
    if window is not None and window < 0:
        raise ValueError(f"a window of {window} tokens: it must be 1 or more, or None for all")
    out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    groups = query.shape[1] // key_cache.shape[2]
    block_size = key_cache.shape[1]
    starts, totals = query_starts.tolist(), lengths.tolist()
    for s, total in enumerate(totals):
        blocks = block_tables[s, : -(-total // block_size)].long()
        key = key_cache[blocks].flatten(0, 1)[:total].repeat_interleave(groups, 1).float()
        value = value_cache[blocks].flatten(0, 1)[:total].repeat_interleave(groups, 1).float()
        q = query[starts[s] : starts[s + 1]].float()
        scores = torch.einsum("qhd,khd->hqk", q, key) * scale
        position = torch.arange(total - q.shape[0], total, device=query.device)
        behind = position[:, None] - torch.arange(total, device=query.device)[None, :]
        hidden = (behind < 0) | (behind >= window) if window else behind < 0
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(q), 1)], -1)
        weights = scores.softmax(-1)[..., :total]
        out[starts[s] : starts[s + 1]] = torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
    return out


def _write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    rows = slots >= 0
    key_cache.flatten(0, 1)[slots[rows]] = key[rows]
    value_cache.flatten(0, 1)[slots[rows]] = value[rows]


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(6)
    mixed = ((1, 600), (40, 70), (1, 1), (0, 3))
    for query_heads, key_heads, dim, value_dim, window, with_sinks, cases in (
        (2, 1, 24, 24, None, False, ((1, 5), (3, 3))),
        (4, 2, 64, 64, None, False, mixed),
        (5, 1, 96, 64, 37, True, mixed),
        (2, 2, 32, 32, 20, True, ((30, 600), (1, 40))),
        (2, 1, 16, 16, None, True, ((1, 1100), (2, 5))),
    ):
        queries, lengths = [c[0] for c in cases], [c[1] for c in cases]
        query = torch.randn(sum(queries) + 2, query_heads, dim, generator=generator).to(dtype)
        tables, key_cache, value_cache = sample_pages(lengths, key_heads, (dim, value_dim), dtype, generator)
        starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        sinks = torch.randn(query_heads, generator=generator).to(dtype) if with_sinks else None
        counts = torch.tensor(lengths, dtype=torch.int32)
        yield query, key_cache, value_cache, tables, starts, counts, dim**-0.5, window, sinks


def sample_pages(
    lengths: list[int], heads: int, dims: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tables of pages in random order, and caches of random keys and values."""
    blocks = [-(-length // 16) for length in lengths]
    tables = torch.zeros(len(lengths), max(blocks, default=1), dtype=torch.int32)
    order = torch.randperm(sum(blocks), generator=generator).to(torch.int32)
    for row, part in enumerate(order.split(blocks)):
        tables[row, : len(part)] = part
    key, value = (torch.randn(sum(blocks), 16, heads, dim, generator=generator).to(dtype) for dim in dims)
    return tables, key, value


def _write_samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(7)
    key, value = (torch.randn(5, 2, dim, generator=generator).to(dtype) for dim in (24, 16))
    caches = [torch.zeros(3, 4, 2, dim, dtype=dtype) for dim in (24, 16)]
    yield key, value, *caches, torch.tensor([11, -1, 0, 5, 4])


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    """16 sequences of 1024 tokens that each ask for one more."""
    query, tables = torch.randn(16, 8, 64).to(dtype), torch.randperm(1024).view(16, 64).to(torch.int32)
    caches = [torch.randn(1024, 16, 2, 64).to(dtype) for _ in range(2)]
    return (
        query,
        *caches,
        tables,
        torch.arange(17, dtype=torch.int32),
        torch.full((16,), 1024, dtype=torch.int32),
        0.125,
    )


def _write_workload(dtype: torch.dtype) -> tuple[Any, ...]:
    """A prompt's chunk of 2048 tokens, to pages in random order."""
    key, value = (torch.randn(2048, 8, 128).to(dtype) for _ in range(2))
    caches = [torch.zeros(256, 16, 8, 128, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(256)[:128, None] * 16 + torch.arange(16)
    return key, value, *caches, slots.flatten()


def _seen(key_cache: Tensor, block_tables: Tensor, window: int | None) -> int:
    """Return the tokens that each query sees, if every table is full: the lengths are not known when tracing."""
    tokens = block_tables.shape[1] * key_cache.shape[1]
    return min(tokens, window) if window else tokens


def _flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    *_: Any,
) -> int:
    """Two products, as if every sequence had one query."""
    return 2 * query[..., 0].numel() * (query.shape[2] + value.shape[3]) * _seen(key, tables, window)


def _traffic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> int:
    token = key.shape[2] * (key.shape[3] + value.shape[3]) * key.element_size()
    return tables.shape[0] * _seen(key, tables, window) * token


PAGED_ATTENTION = register(
    Operator(
        name="paged_attention",
        kernels=(NATIVE, triton("paged_attention"), TILED),
        schema="(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor query_starts, "
        "Tensor lengths, float scale, int? window=None, Tensor? sinks=None) -> Tensor",
        reference=_paged_attention,
        fake=lambda query, key_cache, value_cache, *_: query.new_empty(*query.shape[:2], value_cache.shape[3]),
        samples=_samples,
        workload=_workload,
        flops=_flops,
        traffic=_traffic,
    )
)

WRITE_CACHE = register(
    Operator(
        name="write_cache",
        kernels=(NATIVE, triton("paged_attention"), TILED),
        schema="(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()",
        reference=_write_cache,
        fake=lambda *_: None,
        samples=_write_samples,
        workload=_write_workload,
        flops=lambda *_: 0,
        traffic=lambda key, value, *_: 2 * (key.numel() + value.numel()) * key.element_size(),
    )
)
