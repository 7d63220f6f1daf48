"""Ascend's own fused operators, from `torch_npu`, for the operators whose specification they meet.

Each function is called like an operator and its backward side, with the arguments of their schemas. Signatures and
limits are those of Ascend's documentation of `torch_npu` (op-plugin, docs/zh/custom_APIs/torch_npu, as of August
2026); each docstring names its page. What a vendor's operator does not take is computed by the reference.
Imported only where `torch_npu` is; nothing else imports it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch_npu
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.route import TINY

MASK_SIZE = 2048  # of the triangle that stands for every causal mask (sparse modes 3 and 4)
MOST_DOCUMENTS = 1024  # of a call of attention over packed documents
SOFTMAX_REPEATS = 8  # how often each maximum and sum of a softmax stands side by side
MOST_EXPERTS, EXPERTS_ALIGNMENT = 2048, 32  # of the choice of experts, groups filled up to the alignment
LARGEST_SIDE = 65535  # of a matrix of few bits


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the operator `rms_norm` (page npu_rms_norm)."""
    return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the backward side of `rms_norm`, whose scales are computed again: no operator of ours saves them."""
    _, scale = torch_npu.npu_rms_norm(x, weight, epsilon=eps)
    grad_x, grad_weight = torch_npu.npu_rms_norm_backward(grad, x, weight, scale)
    return grad_x, grad_weight.to(weight.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the operator `add_rms_norm` (page npu_add_rms_norm, which takes no empty tensors)."""
    if not x.numel():
        return OPERATORS["add_rms_norm"].reference(residual, x, weight, eps)
    out, _, total = torch_npu.npu_add_rms_norm(residual, x, weight, epsilon=eps)
    return total, out


def add_rms_norm_backward(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the backward side of `add_rms_norm`."""
    grad_x, grad_weight = rms_norm_backward(grad, total, weight, eps)
    return (grad_x if grad_total is None else grad_x + grad_total), grad_weight


def split_rotary(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    dim: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator `split_rotary` (page npu_rotary_mul, mode half, layout TND)."""
    query, key, value = _heads(qkv, heads, dim)
    if not qkv.numel():
        return query, key, value
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm, eps), rms_norm(key, key_norm, eps)
    angles = _angles(qkv, cosine, sine)
    return torch_npu.npu_rotary_mul(query, *angles), torch_npu.npu_rotary_mul(key, *angles), value


def split_rotary_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    dim: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward side of `split_rotary`: the gradient of a rotation is turned back."""
    grads, norms = [grad_query, grad_key], [qkv.new_empty(0), qkv.new_empty(0)]
    if qkv.numel():
        angles = _angles(qkv, cosine, -sine)
        grads = [torch_npu.npu_rotary_mul(grad.contiguous(), *angles) for grad in grads]
    if query_norm is not None and key_norm is not None:
        normed = zip(grads, _heads(qkv, heads, dim), (query_norm, key_norm), strict=False)
        found = [rms_norm_backward(grad, x, norm, eps) for grad, x, norm in normed]
        grads, norms = [grad for grad, _ in found], [norm for _, norm in found]
    parts = [x.reshape(len(qkv), heads, x.shape[1] // heads, dim) for x in (*grads, grad_value.contiguous())]
    return torch.cat(parts, 2).view(qkv.shape), norms[0], norms[1]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the operator `attention` (page npu_fusion_attention, layout TND)."""
    ends = _ends(boundaries)
    if not 0 < len(ends) <= MOST_DOCUMENTS:
        return OPERATORS["attention"].reference(query, key, value, boundaries, scale, window, sinks)
    wide_value, options = _as_wide_as(key, value), _attention_options(query, ends, window, sinks)
    inputs = (query.contiguous(), key.contiguous(), wide_value)
    out, maximum, total, *_ = torch_npu.npu_fusion_attention(*inputs, query.shape[1], "TND", scale=scale, **options)
    log_sum_exp = (maximum[..., 0] + total[..., 0].log()).t().contiguous()
    return out[..., : value.shape[2]].contiguous(), log_sum_exp


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, ...]:
    """Compute the backward side of `attention` (npu_fusion_attention_grad, what autograd calls for that page).

    The weights that it computes again are exp(score - maximum) / sum, so the logarithm of a whole softmax serves as the
    maximum, with a sum of 1.
    """
    ends = _ends(boundaries)
    if not 0 < len(ends) <= MOST_DOCUMENTS:
        saved = (query, key, value, boundaries, scale, window, sinks, out, log_sum_exp)
        return _gradient("attention")(grad, *saved)
    maximum = log_sum_exp.t()[..., None].expand(-1, -1, SOFTMAX_REPEATS).contiguous()
    inputs = (query.contiguous(), key.contiguous(), *(_as_wide_as(key, x) for x in (value, grad)))
    found = torch_npu.npu_fusion_attention_grad(
        *inputs,
        query.shape[1],
        "TND",
        softmax_max=maximum,
        softmax_sum=torch.ones_like(maximum),
        attention_in=_as_wide_as(key, out),
        scale_value=scale,
        **_attention_options(query, ends, window, sinks),
    )
    grad_sinks = grad.new_empty(0, dtype=torch.float32) if sinks is None else found[4].to(sinks.dtype)
    return found[0], found[1], found[2][..., : value.shape[2]].contiguous(), grad_sinks


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the operator `grouped_linear` (page npu_grouped_matmul, one tensor each, rows grouped)."""
    if not x.numel():
        return OPERATORS["grouped_linear"].reference(x, weight, sizes, bias)
    out = _grouped_product(x.contiguous(), weight.contiguous().mT, sizes, over_rows=False)
    return out if bias is None else out + bias.repeat_interleave(sizes, 0, output_size=len(x))


def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward side of `grouped_linear`; the weight's gradient groups the inner dimension."""
    if not x.numel() or not grad.numel():
        return _gradient("grouped_linear")(grad, x, weight, sizes, with_bias)
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = _grouped_product(grad, weight.contiguous(), sizes, over_rows=False)
    grad_weight = _grouped_product(grad.t(), x, sizes, over_rows=True)
    ones = x.new_ones(len(x), 1)
    grad_bias = _grouped_product(grad.t(), ones, sizes, over_rows=True)[..., 0] if with_bias else grad[:0]
    return grad_x, grad_weight, grad_bias


def route(
    logits: Tensor,
    bias: Tensor | None,
    kept: int,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_best: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the operator `route` (page npu_moe_gating_top_k).

    The vendor's operator divides sigmoids by their sum and leaves a softmax as it is; the other two ways follow here.
    """
    size = logits.shape[1] // groups
    aligned = -(-size // EXPERTS_ALIGNMENT) * EXPERTS_ALIGNMENT * groups
    if not logits.numel() or size < 3 or aligned > MOST_EXPERTS or (groups > 1 and group_best > 2):
        options = (kept, scoring, groups, kept_groups, group_best, normalise, scale)
        return OPERATORS["route"].reference(logits, bias, *options)
    is_softmax = scoring == "softmax"
    weights, chosen, _ = torch_npu.npu_moe_gating_top_k(
        logits,
        kept,
        bias=bias,
        k_group=kept_groups,
        group_count=groups,
        group_select_mode=1 if group_best == 2 else 0,
        norm_type=0 if is_softmax else 1,
        eps=TINY,
    )
    chosen = chosen.long()
    if is_softmax and normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    if not is_softmax and not normalise:
        weights = logits.sigmoid().gather(1, chosen)
    return weights * scale, chosen


def route_backward(grad: Tensor, logits: Tensor, chosen: Tensor, scoring: str, normalise: bool, scale: float) -> Tensor:
    """Compute the backward side of `route`, for which there is no documented operator, from its formula."""
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    own, upper = scores.gather(1, chosen), grad * scale
    if normalise:
        total = own.sum(-1, keepdim=True) + TINY
        upper = (upper - (upper * own).sum(-1, keepdim=True) / total) / total
    slope = torch.zeros_like(scores).scatter_(1, chosen, upper)
    if scoring == "softmax":
        return scores * (slope - (slope * scores).sum(-1, keepdim=True))
    return slope * scores * (1 - scores)


def permute_rows(x: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator `permute_rows` (page npu_moe_init_routing_v2: dropless, counts, scatter indices)."""
    if not chosen.numel():
        return OPERATORS["permute_rows"].reference(x, chosen, count)
    rows, order, sizes, _ = torch_npu.npu_moe_init_routing_v2(
        x,
        chosen.int(),
        active_num=chosen.numel(),
        expert_num=count,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, count],
        row_idx_type=1,
    )
    return rows, order.long(), sizes.to(chosen.dtype)


def permute_rows_backward(grad: Tensor, order: Tensor, per_token: int) -> Tensor:
    """Compute the backward side of `permute_rows` (page npu_moe_finalize_routing, mode 2: choices token by token)."""
    if not grad.numel():
        return _gradient("permute_rows")(grad, order, per_token)
    places = torch.arange(len(order), device=order.device)
    places_of_choices = torch.zeros_like(order).scatter_(0, order, places).int()
    ones = grad.new_ones(len(order) // per_token, per_token)
    return torch_npu.npu_moe_finalize_routing(grad, None, None, None, ones, places_of_choices, None, drop_pad_mode=2)


def quantised_linear(
    x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, kind: str, group: int
) -> Tensor:
    """Compute the operator `quantised_linear` for int8 (page npu_weight_quant_batchmatmul); its int4 lies otherwise."""
    (out, depth), scales_fit = data.shape, scales.dtype is x.dtype
    if kind != "int8" or not scales_fit or not x.numel() or max(out, depth) > LARGEST_SIDE:
        return OPERATORS["quantised_linear"].reference(x, data, scales, zeros, bias, kind, group)
    return torch_npu.npu_weight_quant_batchmatmul(
        x.contiguous(),
        data.t(),
        scales.t(),
        bias=None if bias is None else bias.float(),
        antiquant_group_size=group if group < depth else 0,
    )


def _grouped_product(left: Tensor, right: Tensor, sizes: Tensor, over_rows: bool) -> Tensor:
    """Multiply group by group: groups of the left one's rows, or (over_rows) of the dimension that is summed over."""
    ends = sizes.cumsum(0, dtype=torch.int64)
    return torch_npu.npu_grouped_matmul(
        [left], [right], group_list=ends, split_item=3, group_type=2 if over_rows else 0, group_list_type=0
    )[0]


def _heads(qkv: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of a merged projection, [N, H, D] each."""
    groups = qkv.view(len(qkv), heads, qkv.shape[1] // heads // dim, dim)
    query = groups[:, :, :-2].reshape(len(qkv), heads * (groups.shape[2] - 2), dim)
    return query, groups[:, :, -2].contiguous(), groups[:, :, -1].contiguous()


def _angles(qkv: Tensor, cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """Return the cosines and sines of all of a head's elements, [N, 1, D]."""
    return [torch.cat((x, x), -1)[:, None].to(qkv.dtype) for x in (cosine, sine)]


def _attention_options(query: Tensor, ends: list[int], window: int | None, sinks: Tensor | None) -> dict[str, Any]:
    """Return what forward and backward calls share: causal within documents, or a band of the window's width."""
    sparse = {"sparse_mode": 4, "pre_tockens": window - 1, "next_tockens": 0} if window else {"sparse_mode": 3}
    return {
        "atten_mask": _triangle(query.device),
        "actual_seq_qlen": ends,
        "actual_seq_kvlen": ends,
        "softmax_layout": "TND",
        "sink": None if sinks is None else sinks.float(),
        **sparse,
    }


@functools.cache
def _triangle(device: torch.device) -> Tensor:
    """Return True where a query must not see a key."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def _as_wide_as(key: Tensor, x: Tensor) -> Tensor:
    """Return x with heads as wide as those of the key, filled up with zeros: values must not be narrower."""
    missing = key.shape[2] - x.shape[2]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


_known_ends = WeakTensorKeyDictionary()


def _ends(boundaries: Tensor) -> list[int]:
    """Return where documents end, empty ones left out: the device is waited for once a batch, not in every layer."""
    version = None if boundaries.is_inference() else boundaries._version
    known = _known_ends.get(boundaries)
    if known is None or version is None or known[0] != version:
        known = version, [end for start, end in itertools.pairwise(boundaries.tolist()) if end > start]
        _known_ends[boundaries] = known
    return known[1]


def _gradient(name: str) -> Callable[..., Any]:
    gradient = OPERATORS[name].gradient
    assert gradient is not None
    return gradient.reference
