"""Causal attention over packed documents (training, scoring, whole-prompt prefill).

The native kernel is FlashAttention's (Dao 2023, arXiv 2307.08691): nothing of the size of the scores is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, wide


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T) v where a token sees itself and what precedes it in its own document.

    Args:
        query: [N, Hq, D]; key: [N, Hk, D], Hk divides Hq, query head h reads key head h // (Hq / Hk).
        value: [N, Hk, Dv], Dv at most D.
        boundaries: int32 [M + 1], rising from 0 to N: document m is rows boundaries[m] to boundaries[m + 1].
            Repeated entries at the end (empty documents) fill the tensor to its fixed size.
        scale: factor of the scores, 1 / sqrt(D) as a rule.
        window: a token sees so many tokens, itself included (None: all). Not in the native kernel yet.
        sinks: [Hq], for each head the score of a token without value that all see, or None. Likewise.

    Returns:
        [N, Hq, Dv] in the dtype of query.
    """
    if window is None and sinks is None and takes(ATTENTION, query, key, value):
        padded = F.pad(value, (0, key.shape[2] - value.shape[2])) if value.shape[2] < key.shape[2] else value
        return ATTENTION.call(query, key, padded, boundaries, scale)[0][..., : value.shape[2]]
    return _attention(query, key, value, boundaries, scale, window, sinks)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    visible = _visible(query.shape[0], boundaries, window)
    if sinks is None:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", wide(query), wide(key).repeat_interleave(groups, 1)) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    sink = wide(sinks)[:, None, None].expand(-1, len(query), 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(value.dtype)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(groups, 1))


def _visible(tokens: int, boundaries: Tensor, window: int | None = None) -> Tensor:
    """Return bool [N, N]: whether the row's token sees the column's."""
    rows = torch.arange(tokens, device=boundaries.device)
    document = torch.searchsorted(boundaries[1:].long(), rows, right=True)
    visible = (document[:, None] == document[None, :]) & (rows[:, None] >= rows[None, :])
    return visible if window is None else visible & (rows[:, None] - rows[None, :] < window)


def _reference(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return what `attention` does, and the log of each softmax's denominator, fp32 [Hq, N]."""
    keys = key.detach().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", wide(query.detach()), wide(keys)) * scale
    hidden = ~_visible(query.shape[0], boundaries)
    log_sum_exp = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    return _attention(query, key, value, boundaries, scale).contiguous(), log_sum_exp


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float, *_: Tensor
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, boundaries, scale)
    return tuple(g.contiguous() for g in pull_back(_attention, inputs, (0, 1, 2), (grad,)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.scale = inputs[4]
    ctx.save_for_backward(*inputs[:4], *output)


def _apply(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    return *torch.ops.liaoyuan.attention_backward(grad, *saved[:4], ctx.scale, *saved[4:]), None, None


def _fake(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    log_sum_exp = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(query.shape), log_sum_exp


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _flops(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> int:
    """Two products over the visible half of each document; as one document where the boundaries are not known."""
    if type(boundaries) is not Tensor:
        return 2 * query.numel() * query.shape[0]
    lengths = boundaries.diff().long()
    return 2 * query.shape[1] * query.shape[2] * int((lengths * (lengths + 1)).sum())


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(4)
    for lengths, query_heads, key_heads, dim in (((1, 5, 0, 40, 0), 3, 1, 24), ((70, 600), 4, 2, 64)):
        query = torch.randn(sum(lengths), query_heads, dim, generator=generator).to(dtype)
        key, value = (torch.randn(sum(lengths), key_heads, dim, generator=generator).to(dtype) for _ in range(2))
        boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        yield query, key, value, boundaries, dim**-0.5


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    query, key, value = (torch.randn(2048, heads, 64).to(dtype) for heads in (8, 2, 2))
    return query, key, value, torch.tensor([0, 2048], dtype=torch.int32), 0.125


ATTENTION = register(
    Operator(
        name="attention",
        kernels=(NATIVE, triton("attention")),
        schema="(Tensor query, Tensor key, Tensor value, Tensor boundaries, float scale) -> (Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        samples=_samples,
        workload=_workload,
        flops=_flops,
        traffic=lambda query, key, *_: 2 * (query.numel() + key.numel()) * query.element_size(),
        gradient=Gradient(
            inputs=(0, 1, 2),
            schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor boundaries, float scale, "
            "Tensor out, Tensor log_sum_exp) -> (Tensor, Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=_save,
            apply=_apply,
            flops=lambda grad, *inputs: 5 * _flops(*inputs[:5]) // 2,  # five products for the forward pass's two
        ),
    )
)
