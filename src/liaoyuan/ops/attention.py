"""Causal attention over packed documents (training, scoring, whole-prompt prefill).

The native kernel is FlashAttention's (Dao 2023, arXiv 2307.08691): nothing of the size of the scores is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import ASCEND, NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, save_inputs, saved_inputs, wide
from liaoyuan.ops.shapes import takes_shapes


@takes_shapes(
    query="float [N, Hq, D]",
    key="same [N, Hk, D]",
    value="same [N, Hk, Dv]",
    boundaries="int32 [_]",
    sinks="float [Hq]",
    multiple=("Hq", "Hk"),
)
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
        value: [N, Hk, Dv].
        boundaries: int32 [M + 1], rising from 0 to N: document m is rows boundaries[m] to boundaries[m + 1].
            Repeated entries at the end (empty documents) fill the tensor to its fixed size.
        scale: factor of the scores, 1 / sqrt(D) as a rule.
        window: a token sees so many tokens, itself included (None or 0: all).
        sinks: [Hq], for each head the score of a token without value that all see (gpt-oss, arXiv 2508.10925), or None.

    Returns:
        [N, Hq, Dv] in the dtype of query.
    """
    if takes(ATTENTION, query, key, value):
        return ATTENTION.call(query, key, value, boundaries, scale, window, sinks)[0]
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
    if window is not None and window < 0:
        raise ValueError(f"a window of {window} tokens: it must be 1 or more, or None for all")
    rows = torch.arange(tokens, device=boundaries.device)
    document = torch.searchsorted(boundaries[1:].long(), rows, right=True)
    visible = (document[:, None] == document[None, :]) & (rows[:, None] >= rows[None, :])
    return visible & (rows[:, None] - rows[None, :] < window) if window else visible


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `attention` does, and the log of each softmax's denominator, fp32 [Hq, N]."""
    keys = key.detach().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", wide(query.detach()), wide(keys)) * scale
    hidden = ~_visible(query.shape[0], boundaries, window)
    log_sum_exp = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    if sinks is not None:
        log_sum_exp = torch.logaddexp(log_sum_exp, wide(sinks.detach())[:, None])
    return _attention(query, key, value, boundaries, scale, window, sinks).contiguous(), log_sum_exp


def _backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    *inputs, _, _ = saved
    wanted = (0, 1, 2) if inputs[6] is None else (0, 1, 2, 6)
    found = [g.contiguous() for g in pull_back(_attention, inputs, wanted, (grad,))]
    return tuple(found) if len(found) == 4 else (*found, grad.new_empty(0, dtype=torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    save_inputs(ctx, (*inputs, *output), output)


def _apply(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    saved = saved_inputs(ctx)
    *grads, grad_sinks = torch.ops.liaoyuan.attention_backward(grad, *saved)
    return *grads, None, None, None, None if saved[6] is None else grad_sinks


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    log_sum_exp = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(*query.shape[:2], value.shape[2]), log_sum_exp


def _fake_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    sinks = saved[6]
    grad_sinks = grad.new_empty(0, dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
    return *(x.new_empty(x.shape) for x in saved[:3]), grad_sinks


def visible_pairs(tokens: int, window: int | None) -> int:
    """Return how many pairs of a token and one that it sees a document of so many tokens has."""
    hidden = max(tokens - window, 0) if window else 0
    return (tokens * (tokens + 1) - hidden * (hidden + 1)) // 2


def _pairs(query: Tensor, boundaries: Tensor, window: int | None) -> int:
    """Return the visible pairs of all heads; as of one document where the boundaries are not known."""
    lengths = boundaries.diff().tolist() if type(boundaries) is Tensor else [query.shape[0]]
    return query.shape[1] * sum(visible_pairs(length, window) for length in lengths)


def _flops(
    query: Tensor, _: Tensor, value: Tensor, boundaries: Tensor, scale: float, window: int | None = None, *__: Any
) -> int:
    """Two products over the visible pairs."""
    return 2 * _pairs(query, boundaries, window) * (query.shape[2] + value.shape[2])


def _flops_backward(
    grad: Tensor,
    query: Tensor,
    _: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None,
    *__: Any,
) -> int:
    """Five products: scores, their gradient, and the gradients of query, key and value."""
    return 2 * _pairs(query, boundaries, window) * (3 * query.shape[2] + 2 * value.shape[2])


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(4)
    for lengths, query_heads, key_heads, dim, value_dim, window, with_sinks in (
        ((1, 5, 0, 40, 0), 3, 1, 24, 24, 4, True),
        ((1, 5, 0, 40, 0), 3, 1, 24, 24, None, False),
        ((70, 600), 4, 2, 64, 64, None, False),
        ((70, 600), 2, 1, 64, 64, 33, True),
        ((20, 50), 2, 2, 48, 32, None, False),
        ((3, 520), 8, 1, 8, 8, None, False),  # rows enough to be cut into parts
    ):
        query = torch.randn(sum(lengths), query_heads, dim, generator=generator).to(dtype)
        key = torch.randn(sum(lengths), key_heads, dim, generator=generator).to(dtype)
        value = torch.randn(sum(lengths), key_heads, value_dim, generator=generator).to(dtype)
        boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        sinks = torch.randn(query_heads, generator=generator).to(dtype) if with_sinks else None
        yield query, key, value, boundaries, dim**-0.5, window, sinks


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    query, key, value = (torch.randn(2048, heads, 64).to(dtype) for heads in (8, 2, 2))
    return query, key, value, torch.tensor([0, 2048], dtype=torch.int32), 0.125


ATTENTION = register(
    Operator(
        name="attention",
        kernels=(NATIVE, ASCEND, triton("attention"), TILED),
        schema="(Tensor query, Tensor key, Tensor value, Tensor boundaries, float scale, int? window=None, "
        "Tensor? sinks=None) -> (Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        samples=_samples,
        workload=_workload,
        flops=_flops,
        traffic=lambda query, key, value, *_: (
            (query.numel() + key.numel() + value.numel() + query[..., 0].numel() * value.shape[2])
            * query.element_size()
        ),
        gradient=Gradient(
            inputs=(0, 1, 2, 6),
            schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor boundaries, float scale, int? window, "
            "Tensor? sinks, Tensor out, Tensor log_sum_exp) -> (Tensor, Tensor, Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=_save,
            apply=_apply,
            flops=_flops_backward,
        ),
    )
)
