"""Causal attention over a paged key-value cache (decode and chunked prefill in one batch)."""

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """Return the attention of each sequence's newest tokens over all of its cached tokens.

    Args:
        query: [N, Hq, D], the sequences' new tokens one after another.
        key_cache, value_cache: [B, block_size, Hk, D]; the new tokens' keys and values are already in it.
        block_tables: int32 [S, max_blocks], the cache blocks of each sequence in order.
        query_starts: int32 [S + 1], sequence s owns query rows query_starts[s] to query_starts[s + 1].
        lengths: int32 [S], cached tokens of each sequence, the new ones included.
        scale: factor of the scores.

    Returns:
        [N, Hq, D] in the dtype of query. Rows after query_starts[S] are zero.
    """
    out = torch.zeros_like(query)
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
        hidden = torch.arange(total, device=query.device)[None, :] > position[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[starts[s] : starts[s + 1]] = torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
    return out
