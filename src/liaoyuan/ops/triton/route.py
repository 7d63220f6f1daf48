"""The choice of experts: a program holds the scores of some tokens and picks the best one after another.

There are few experts to pick, so that is cheaper than to sort, and Ascend's compiler has no sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.route import TINY
from liaoyuan.ops.triton.launch import ELEMENTS, ceil_div, fits, launch, power_of_two, programs

NOTHING = tl.constexpr(TINY)


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
    """Compute the operator `route`."""
    rows, experts = logits.shape
    if not fits(experts, logits):
        asked = (kept, scoring, groups, kept_groups, group_best, normalise, scale)
        return OPERATORS["route"].reference(logits, bias, *asked)
    logits = logits.contiguous()
    weights, chosen = (logits.new_empty(rows, kept, dtype=dtype) for dtype in (torch.float32, torch.long))
    own_bias = logits if bias is None else bias.contiguous()
    numbers = (rows, experts, kept, groups, kept_groups, min(group_best, experts // groups), scale)
    flags = {"BIAS": bias is not None, "SOFTMAX": scoring == "softmax", "NORMALISE": normalise}
    sizes = {"GROUPS": power_of_two(groups), "KEPT": power_of_two(kept), **_sizes(experts)}
    grid = (programs(ceil_div(rows, sizes["ROWS"])),)
    launch(_forward, grid, logits, logits, own_bias, weights, chosen, *numbers, **flags, **sizes)
    return weights, chosen


def route_backward(grad: Tensor, logits: Tensor, chosen: Tensor, scoring: str, normalise: bool, scale: float) -> Tensor:
    """Compute the backward side of `route`."""
    (rows, experts), kept = logits.shape, chosen.shape[1]
    if not fits(experts, logits):
        gradient = OPERATORS["route"].gradient
        assert gradient is not None
        return gradient.reference(grad, logits, chosen, scoring, normalise, scale)
    grad, logits, chosen = grad.contiguous(), logits.contiguous(), chosen.contiguous()
    result, sizes = logits.new_empty(logits.shape), _sizes(experts)
    grid = (programs(ceil_div(rows, sizes["ROWS"])),)
    arguments = (grad, logits, chosen, result, rows, experts, kept, scale)
    launch(_backward, grid, logits, *arguments, SOFTMAX=scoring == "softmax", NORMALISE=normalise, **sizes)
    return result


def _sizes(experts: int) -> dict[str, int]:
    """Return the tile of a program: as many tokens as make a usual number of elements."""
    block = power_of_two(experts)
    return {"ROWS": max(1, ELEMENTS // block), "BLOCK": block}


@triton.jit
def _scores(logits, at, inside, SOFTMAX: tl.constexpr):
    """Return a tile's scores, zero where there is no expert."""
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        highest = tl.max(x, 1)
        part = tl.exp(x - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
        summed = tl.sum(part, 1)
        scores = part / tl.where(summed == 0.0, 1.0, summed)[:, None]
    else:
        scores = tl.where(inside, tl.sigmoid(x), 0.0)
    return scores


@triton.jit
def _best(values, free, column, count):
    """Return for each row the column of the highest value that is free, of equals the first; always below `count`."""
    highest = tl.max(tl.where(free, values, float("-inf")), 1)
    is_highest = free & (values >= highest[:, None])
    return tl.minimum(tl.min(tl.where(is_highest, column[None, :], count), 1), count - 1)


@triton.jit
def _in_best_groups(
    values, inside, column, experts, groups, kept_groups, group_best, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Return whether a column is in one of the best groups; a group is as good as the sum of its best experts."""
    group, size = tl.arange(0, GROUPS), experts // groups
    goodness = tl.full([ROWS, GROUPS], float("-inf"), tl.float32)
    for each in range(groups):
        free = inside & (column // size == each)[None, :]
        summed = tl.zeros([ROWS], tl.float32)
        for _ in range(group_best):
            best = _best(values, free, column, experts)
            is_best = column[None, :] == best[:, None]
            summed += tl.sum(tl.where(is_best, values, 0.0), 1)
            free = free & (column[None, :] != best[:, None])
        goodness = tl.where((group == each)[None, :], summed[:, None], goodness)
    allowed = inside & (column < 0)[None, :]
    free = goodness >= float("-inf")
    free = free & (group < groups)[None, :]
    for _ in range(kept_groups):
        best = _best(goodness, free, group, groups)
        allowed = allowed | (inside & ((column // size)[None, :] == best[:, None]))
        free = free & (group[None, :] != best[:, None])
    return allowed


@triton.jit(do_not_specialize=("rows",))
def _forward(
    logits, bias, weights, chosen, rows, experts, kept, groups, kept_groups, group_best, scale,
    BIAS: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column, slot = tl.arange(0, BLOCK), tl.arange(0, KEPT)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < experts)[None, :]
        scores = _scores(logits, row.to(tl.int64)[:, None] * experts + column[None, :], inside, SOFTMAX)
        values = scores
        if BIAS:
            values += tl.load(bias + column, mask=column < experts, other=0.0)[None, :]
        free = inside
        if GROUPS > 1:
            free = _in_best_groups(values, inside, column, experts, groups, kept_groups, group_best, ROWS, GROUPS)
        own_weights = tl.zeros([ROWS, KEPT], tl.float32)
        own_chosen = tl.zeros([ROWS, KEPT], tl.int32)
        for place in range(kept):
            best = _best(values, free, column, experts)
            is_best = column[None, :] == best[:, None]
            own = tl.sum(tl.where(is_best, scores, 0.0), 1)
            own_weights = tl.where((slot == place)[None, :], own[:, None], own_weights)
            own_chosen = tl.where((slot == place)[None, :], best[:, None], own_chosen)
            free = free & (column[None, :] != best[:, None])
        if NORMALISE:
            own_weights = own_weights / (tl.sum(own_weights, 1) + NOTHING)[:, None]
        at = row.to(tl.int64)[:, None] * kept + slot[None, :]
        mask = (row < rows)[:, None] & (slot < kept)[None, :]
        tl.store(weights + at, own_weights * scale, mask=mask)
        tl.store(chosen + at, own_chosen.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=("rows",))
def _backward(
    grad, logits, chosen, result, rows, experts, kept, scale,
    SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        valid = row < rows
        inside = valid[:, None] & (column < experts)[None, :]
        at = row.to(tl.int64)[:, None] * experts + column[None, :]
        scores = _scores(logits, at, inside, SOFTMAX)
        grad_scores = tl.zeros([ROWS, BLOCK], tl.float32)  # of the weights before they are divided by their sum
        is_chosen = grad_scores
        for place in range(kept):
            choice = row.to(tl.int64) * kept + place
            expert = tl.load(chosen + choice, mask=valid, other=-1).to(tl.int32)
            upper = tl.load(grad + choice, mask=valid, other=0.0).to(tl.float32)
            is_it = tl.where(column[None, :] == expert[:, None], 1.0, 0.0)
            grad_scores += is_it * upper[:, None]
            is_chosen += is_it
        if NORMALISE:
            total = tl.sum(is_chosen * scores, 1) + NOTHING
            shared = tl.sum(grad_scores * scores, 1) / total
            grad_scores = (grad_scores - is_chosen * shared[:, None]) / total[:, None]
        grad_scores *= scale
        if SOFTMAX:
            found = scores * (grad_scores - tl.sum(grad_scores * scores, 1)[:, None])
        else:
            found = grad_scores * scores * (1.0 - scores)
        tl.store(result + at, found.to(result.dtype.element_ty), mask=inside)
