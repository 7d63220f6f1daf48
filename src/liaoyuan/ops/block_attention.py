"""Attention of a block of queries over a block of keys, each query over a range of them: what ring attention is
made of. Blocks of one softmax are merged by the logarithms of their denominators (Dao et al. 2022, arXiv 2205.14135).
"""

import torch
from torch import Tensor

from liaoyuan.ops.operator import wide


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * q k^T) v of each query over keys first[n] .. last[n] - 1, and the log of its denominator.

    Args:
        query: [N, Hq, D]; key: [M, Hk, D]; value: [M, Hk, Dv]; Hk divides Hq.
        first, last: int64 [N]; an empty range gives zeros and -inf.

    Returns:
        [N, Hq, Dv] and [N, Hq], fp32 (fp64 for fp64).
    """
    scores = _scores(query, key, first, last, scale)
    log_sum_exp = scores.logsumexp(-1)  # [Hk, G, N]
    safe = log_sum_exp.masked_fill(log_sum_exp == float("-inf"), 0.0)
    out = torch.einsum("hgnm,mhd->nhgd", (scores - safe[..., None]).exp(), wide(value))
    return out.flatten(1, 2), log_sum_exp.flatten(0, 1).t()


def block_attention_backward(
    grad: Tensor,
    delta: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this block's share of the gradients of query, key and value.

    Args:
        grad: [N, Hq, Dv] of the merged output. log_sum_exp: [N, Hq] of the whole softmax.
        delta: [N, Hq], rowsum(grad * output) less the gradient of log_sum_exp (Dao 2023, arXiv 2307.08691, sec. 3.1).
    """
    heads = key.shape[1]
    scores = _scores(query, key, first, last, scale)
    shape = (heads, -1, scores.shape[2], 1)  # [Hk, G, N, 1]
    p = (scores - log_sum_exp.t().reshape(shape)).exp()
    grad_g, query_g = (wide(x).unflatten(1, (heads, -1)) for x in (grad, query))  # [N, Hk, G, D]
    grad_value = torch.einsum("hgnm,nhgd->mhd", p, grad_g)
    grad_p = torch.einsum("nhgd,mhd->hgnm", grad_g, wide(value))
    grad_scores = p * (grad_p - delta.t().reshape(shape)) * scale
    grad_query = torch.einsum("hgnm,mhd->nhgd", grad_scores, wide(key)).flatten(1, 2)
    grad_key = torch.einsum("hgnm,nhgd->mhd", grad_scores, query_g)
    return grad_query, grad_key, grad_value


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return two blocks' outputs [N, H, D] and log-denominators [N, H] as those of one softmax over both."""
    total = torch.logaddexp(lse, more_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    return out * (lse - safe).exp()[..., None] + more * (more_lse - safe).exp()[..., None], total


def _scores(query: Tensor, key: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """Return masked scores [Hk, G, N, M]."""
    grouped = wide(query).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("nhgd,mhd->hgnm", grouped, wide(key)) * scale
    place = torch.arange(key.shape[0], device=key.device)
    seen = (place[None, :] >= first[:, None]) & (place[None, :] < last[:, None])
    return scores.masked_fill(~seen, float("-inf"))
