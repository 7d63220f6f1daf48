"""The way of rows to their experts and back: rows are copied, or added up, straight between the two orders.

The sort of a few numbers for each token is the vendor's. No program adds to what another one writes: each token's
results are looked up by the inverse of the order, and added in the order of its choice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ELEMENTS, launch, power_of_two, programs


def permute_rows(x: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator `permute_rows`; an expert that does not exist is not looked for: the device would wait."""
    x = x.contiguous()
    experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(count + 1, device=x.device, dtype=experts.dtype))
    rows = x.new_empty(len(order), x.shape[1])
    launch(_copy, (programs(len(rows)),), x, x, order, rows, len(rows), x.shape[1], chosen.shape[1], **_block(x))
    return rows, order, ends.diff().to(chosen.dtype)


def permute_rows_backward(grad: Tensor, order: Tensor, per_token: int) -> Tensor:
    """Compute the backward side of `permute_rows`."""
    result = grad.new_empty(grad.shape[0] // per_token, grad.shape[1])
    _add_up(grad.contiguous(), order, None, result, per_token)
    return result


def combine_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Compute the operator `combine_rows`."""
    result = rows.new_empty(weights.shape[0], rows.shape[1])
    _add_up(rows.contiguous(), order, weights.contiguous(), result, weights.shape[1])
    return result


def combine_rows_backward(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the backward side of `combine_rows`."""
    grad, rows, weights = grad.contiguous(), rows.contiguous(), weights.contiguous()
    grad_rows, grad_weights = rows.new_empty(rows.shape), weights.new_empty(weights.shape)
    arguments = (grad, rows, order.contiguous(), weights, grad_rows, grad_weights)
    numbers = (len(rows), rows.shape[1], weights.shape[1])
    launch(_deal_out, (programs(len(rows)),), rows, *arguments, *numbers, **_block(rows))
    return grad_rows, grad_weights


def _add_up(rows: Tensor, order: Tensor, weights: Tensor | None, result: Tensor, per_token: int) -> None:
    places = torch.arange(len(order), device=order.device)
    places_of_choices = torch.zeros_like(order).scatter_(0, order, places)  # zero: a wrong order reads no other memory
    arguments = (rows, places_of_choices, rows if weights is None else weights, result)
    numbers = (len(result), rows.shape[1], per_token)
    launch(_sum, (programs(len(result)),), rows, *arguments, *numbers, WEIGHTS=weights is not None, **_block(rows))


def _block(x: Tensor) -> dict[str, int]:
    return {"BLOCK": min(ELEMENTS, power_of_two(x.shape[1]))}


@triton.jit(do_not_specialize=("count",))
def _copy(x, order, rows, count, width, per_token, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        token = tl.load(order + row) // per_token
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            value = tl.load(x + token * width + column, mask=column < width, other=0.0)
            tl.store(rows + tl.cast(row, tl.int64) * width + column, value, mask=column < width)


@triton.jit(do_not_specialize=("count",))
def _sum(rows, places, weights, result, count, width, per_token, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    for token in range(tl.program_id(0), count, tl.num_programs(0)):
        choices = tl.cast(token, tl.int64) * per_token
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            summed = tl.zeros([BLOCK], tl.float32)
            for choice in range(per_token):
                row = tl.load(places + choices + choice)
                value = tl.load(rows + row * width + column, mask=column < width, other=0.0).to(tl.float32)
                if WEIGHTS:
                    value *= tl.load(weights + choices + choice)
                summed += value
            at = result + tl.cast(token, tl.int64) * width + column
            tl.store(at, summed.to(result.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=("count",))
def _deal_out(grad, rows, order, weights, grad_rows, grad_weights, count, width, per_token, BLOCK: tl.constexpr):
    """Write each row's share of its token's gradient, and the gradient of its weight."""
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        choice = tl.load(order + row)
        weight = tl.load(weights + choice)
        summed = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            own = tl.cast(row, tl.int64) * width + column
            upper = tl.load(grad + choice // per_token * width + column, mask=column < width, other=0.0)
            value = tl.load(rows + own, mask=column < width, other=0.0).to(tl.float32)
            summed += value * upper.to(tl.float32)
            tl.store(
                grad_rows + own, (upper.to(tl.float32) * weight).to(grad_rows.dtype.element_ty), mask=column < width
            )
        tl.store(grad_weights + choice, tl.sum(summed, 0))
