"""Attention of a block of queries over a block of keys, each query over a range of them: what ring attention is
made of. Blocks of one softmax are merged by the logarithms of their denominators (Dao et al. 2022, arXiv 2205.14135).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, triton
from liaoyuan.ops.operator import Gradient, Operator, register, save_inputs, saved_inputs, wide
from liaoyuan.ops.shapes import takes_shapes


@takes_shapes(
    query="float [N, Hq, D]",
    key="same [M, Hk, D]",
    value="same [M, Hk, Dv]",
    first="int64 [N]",
    last="int64 [N]",
    multiple=("Hq", "Hk"),
)
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
    if takes(BLOCK_ATTENTION, query, key, value):
        return BLOCK_ATTENTION.call(query, key, value, first, last, scale)
    return _reference(query, key, value, first, last, scale)


@takes_shapes(
    grad="float [N, Hq, Dv]",
    delta="float [N, Hq]",
    log_sum_exp="float [N, Hq]",
    query="float [N, Hq, D]",
    key="float [M, Hk, D]",
    value="float [M, Hk, Dv]",
    first="int64 [N]",
    last="int64 [N]",
    multiple=("Hq", "Hk"),
)
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
    """Return this block's share of the gradients of query, key and value, fp32 (fp64 for fp64).

    Args:
        grad: [N, Hq, Dv] of the merged output, fp32. log_sum_exp: fp32 [N, Hq] of the whole softmax.
        delta: fp32 [N, Hq], rowsum(grad * output) less the gradient of log_sum_exp (Dao 2023, arXiv 2307.08691,
            sec. 3.1).
    """
    arguments = (grad, delta, log_sum_exp, query, key, value, first, last, scale)
    if takes(BLOCK_ATTENTION, query, key, value):
        return torch.ops.liaoyuan.block_attention_backward(*arguments)
    return _backward(*arguments)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return two blocks' outputs [N, H, D] and log-denominators [N, H] as those of one softmax over both."""
    total = torch.logaddexp(lse, more_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    return out * (lse - safe).exp()[..., None] + more * (more_lse - safe).exp()[..., None], total


def _reference(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, first, last, scale)
    log_sum_exp = scores.logsumexp(-1)  # [Hk, G, N]
    safe = log_sum_exp.masked_fill(log_sum_exp == float("-inf"), 0.0)
    out = torch.einsum("hgnm,mhd->nhgd", (scores - safe[..., None]).exp(), wide(value))
    return out.flatten(1, 2), log_sum_exp.flatten(0, 1).t().contiguous()


def _backward(
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
    heads = key.shape[1]
    scores = _scores(query, key, first, last, scale)
    shape = (heads, -1, scores.shape[2], 1)  # [Hk, G, N, 1]
    p = (scores - log_sum_exp.t().reshape(shape)).exp()
    p = p.masked_fill(scores == float("-inf"), 0.0)  # a row that sees nothing at all has -inf - -inf
    grad_g, query_g = (wide(x).unflatten(1, (heads, -1)) for x in (grad, query))  # [N, Hk, G, D]
    grad_value = torch.einsum("hgnm,nhgd->mhd", p, grad_g)
    grad_p = torch.einsum("nhgd,mhd->hgnm", grad_g, wide(value))
    grad_scores = p * (grad_p - delta.t().reshape(shape)) * scale
    grad_query = torch.einsum("hgnm,mhd->nhgd", grad_scores, wide(key)).flatten(1, 2)
    grad_key = torch.einsum("hgnm,nhgd->mhd", grad_scores, query_g)
    return grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous()


def _scores(query: Tensor, key: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """Return masked scores [Hk, G, N, M]."""
    grouped = wide(query).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("nhgd,mhd->hgnm", grouped, wide(key)) * scale
    place = torch.arange(key.shape[0], device=key.device)
    seen = (place[None, :] >= first[:, None]) & (place[None, :] < last[:, None])
    return scores.masked_fill(~seen, float("-inf"))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, (*output, *inputs), output)


def _apply(ctx: Any, grad: Tensor | None, grad_log_sum_exp: Tensor | None) -> tuple[Any, ...]:
    out, log_sum_exp, *inputs = saved_inputs(ctx)
    grad = torch.zeros_like(out) if grad is None else grad
    delta = (grad * out).sum(-1)
    delta = delta if grad_log_sum_exp is None else delta - grad_log_sum_exp
    found = torch.ops.liaoyuan.block_attention_backward(grad, delta, log_sum_exp, *inputs)
    return *(g.to(x.dtype) for g, x in zip(found, inputs, strict=False)), None, None, None


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = wide(query.new_empty(*query.shape[:2], value.shape[2]))
    return out, out.new_empty(query.shape[:2])


def _fake_backward(
    grad: Tensor, delta: Tensor, log_sum_exp: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(wide(x.new_empty(x.shape)) for x in (query, key, value))


def _pairs(query: Tensor, key: Tensor, first: Tensor, last: Tensor) -> int:
    """Return the visible pairs of all heads; all pairs where the ranges are not known."""
    known = type(first) is Tensor and type(last) is Tensor
    return query.shape[1] * (int((last - first).clamp_min(0).sum()) if known else len(query) * len(key))


def _flops(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> int:
    return 2 * _pairs(query, key, first, last) * (query.shape[2] + value.shape[2])


def _flops_backward(
    grad: Tensor,
    delta: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
) -> int:
    return 2 * _pairs(query, key, first, last) * (3 * query.shape[2] + 2 * value.shape[2])


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(9)
    for queries, keys, query_heads, key_heads, dim, value_dim in ((5, 7, 3, 1, 16, 8), (70, 600, 4, 2, 48, 64)):
        query = torch.randn(queries, query_heads, dim, generator=generator).to(dtype)
        key = torch.randn(keys, key_heads, dim, generator=generator).to(dtype)
        value = torch.randn(keys, key_heads, value_dim, generator=generator).to(dtype)
        ends = torch.randint(0, keys, (2, queries), generator=generator).sort(0).values
        yield query, key, value, ends[0], ends[1] + 1, dim**-0.5


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    query, key, value = (torch.randn(1024, heads, 64).to(dtype) for heads in (8, 2, 2))
    last = torch.arange(1024) + 1
    return query, key, value, torch.zeros_like(last), last, 0.125


BLOCK_ATTENTION = register(
    Operator(
        name="block_attention",
        kernels=(NATIVE, triton("block_attention")),
        schema="(Tensor query, Tensor key, Tensor value, Tensor first, Tensor last, float scale) -> (Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        samples=_samples,
        workload=_workload,
        flops=_flops,
        traffic=lambda query, key, value, *_: (
            (query.numel() + key.numel() + value.numel()) * query.element_size()
            + 4 * query[..., 0].numel() * (value.shape[2] + 1)
        ),
        gradient=Gradient(
            inputs=(0, 1, 2),
            schema="(Tensor grad, Tensor delta, Tensor log_sum_exp, Tensor query, Tensor key, Tensor value, "
            "Tensor first, Tensor last, float scale) -> (Tensor, Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=_save,
            apply=_apply,
            flops=_flops_backward,
        ),
    )
)
