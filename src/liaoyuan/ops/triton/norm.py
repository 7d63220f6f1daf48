"""RMSNorm, alone and joined with the residual addition: a program holds a row whole and reads it once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.triton.launch import PARTIAL_SUMS, ceil_div, fits, launch, power_of_two, programs, row_warps


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the operator `rms_norm`."""
    if not fits(x.shape[-1], x):
        return OPERATORS["rms_norm"].reference(x, weight, eps)
    x = x.contiguous()
    out = x.new_empty(x.shape)
    _run_forward(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the operator `add_rms_norm`."""
    if not fits(x.shape[-1], x):
        return OPERATORS["add_rms_norm"].reference(residual, x, weight, eps)
    total, out = x.new_empty(x.shape), x.new_empty(x.shape)
    _run_forward(residual.contiguous(), x.contiguous(), weight, total, out, eps, add=True)
    return total, out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the backward side of `rms_norm`."""
    return add_rms_norm_backward(None, grad, x, weight, eps)


def add_rms_norm_backward(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the backward side of `add_rms_norm`, and without `grad_total` that of `rms_norm`."""
    width = total.shape[-1]
    if not fits(width, total):
        return _wide_backward(grad_total, grad, total, weight, eps)
    grad, total = grad.contiguous(), total.contiguous()
    upper = grad if grad_total is None else grad_total.contiguous()
    rows = total.numel() // max(width, 1)
    share = ceil_div(rows, PARTIAL_SUMS)
    programs = ceil_div(rows, share) if rows else 0
    grad_in, partial = total.new_empty(total.shape), total.new_empty(programs, width, dtype=torch.float32)
    block = power_of_two(width)
    arguments = (upper, grad, total, weight.contiguous(), grad_in, partial, rows, share, width, eps)
    options = {"ADD": grad_total is not None, "BLOCK": block, "num_warps": row_warps(block)}
    launch(_backward, (programs,), total, *arguments, **options)
    return grad_in, partial.sum(0).to(weight.dtype)


def _run_forward(
    residual: Tensor, x: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, add: bool
) -> None:
    width = x.shape[-1]
    block = power_of_two(width)
    rows = x.numel() // max(width, 1)
    arguments = (residual, x, weight.contiguous(), total, out, rows, width, eps)
    launch(_forward, (programs(rows),), x, *arguments, ADD=add, BLOCK=block, num_warps=row_warps(block))


def _wide_backward(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    gradient = OPERATORS["add_rms_norm"].gradient
    assert gradient is not None
    return gradient.reference(grad_total, grad, total, weight, eps)


@triton.jit(do_not_specialize=("rows",))
def _forward(residual, x, weight, total, out, rows, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    inside = place < width
    factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + place
        value = tl.load(x + at, mask=inside, other=0.0)
        if ADD:
            added = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32) + value.to(tl.float32)
            value = added.to(value.dtype)  # the norm is that of the sum as it is stored
            tl.store(total + at, value, mask=inside)
        wide = value.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
        tl.store(out + at, (wide * scale * factor).to(value.dtype), mask=inside)


@triton.jit(do_not_specialize=("rows", "share"))
def _backward(
    grad_total, grad, total, weight, grad_in, partial, rows, share, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """Work through a share of the rows, and write their sum for the weight's gradient."""
    program = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < width
    factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for row in range(program * share, tl.minimum(program * share + share, rows)):
        at = tl.cast(row, tl.int64) * width + place
        x = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        upper = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
        inner = tl.sum(x * upper * factor, 0) * scale * scale / width
        result = scale * (upper * factor - x * inner)
        if ADD:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_in + at, result.to(grad_in.dtype.element_ty), mask=inside)
        summed += upper * x * scale
    tl.store(partial + program * width + place, summed, mask=inside)
