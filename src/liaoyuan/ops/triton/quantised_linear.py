"""The linear layer with weights of few bits: a program takes weights to numbers as it reads them.

A weight in steps is a whole number (or one of four bits of mantissa) that bf16 holds exactly, so the products are those
of the steps, and a group's sum is multiplied by its scale: nothing is rounded before the sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.quantised_linear import BLOCK
from liaoyuan.ops.triton.launch import ceil_div, launch, quantised_tile

PACKED = tl.constexpr(BLOCK)  # weights of int4 that lie together
PLANE = tl.constexpr(BLOCK // 4)  # of them, those that a fourth of every halfword has
ZERO = tl.constexpr(8)  # what stands for 0 where there are no zero points


def quantised_linear(
    x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, kind: str, group: int
) -> Tensor:
    """Compute the operator `quantised_linear`."""
    x, data, scales = x.contiguous(), data.contiguous(), scales.contiguous()
    (rows, depth), columns = x.shape, data.shape[0]
    out, tile = x.new_empty(rows, columns), quantised_tile()
    others = (scales if zeros is None else zeros.contiguous(), out if bias is None else bias.contiguous())
    options = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
    flags = {"ZEROS": zeros is not None, "BIAS": bias is not None, "FP8": kind == "fp8"}
    weights = data.view(torch.int16 if kind == "int4" else data.dtype)
    grid = (ceil_div(columns, tile.columns), ceil_div(rows, tile.rows))
    arguments = (x, weights, scales, *others, out, rows, columns, depth, weights.shape[1], scales.shape[1])
    kernel = _of_halfwords if kind == "int4" else _of_bytes
    launch(kernel, grid, x, *arguments, **flags, **options, GROUP=group, DEPTH=tile.depth)
    return out


@triton.jit
def _of_fp8(bits):
    """Return the numbers of e4m3 with these bits, int32: built as fp32, since older cards know no fp8."""
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = ((exponent + 120) << 23 | mantissa << 20).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where(bits > 127, -size, size)


@triton.jit
def _rows_of(x, row, rows, first, depth, DEPTH: tl.constexpr):
    """Return DEPTH columns of some rows of x, zero where there are none."""
    inner = first + tl.arange(0, DEPTH)
    at = x + row.to(tl.int64)[:, None] * depth + inner[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (inner < depth)[None, :], other=0.0)


@triton.jit
def _write(result, bias, out, row, rows, column, columns, BIAS: tl.constexpr):
    if BIAS:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows",))
def _of_bytes(
    x, weights, scales, zeros, bias, out, rows, columns, depth, stride, groups,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid, inner = column < columns, tl.arange(0, DEPTH)
    of_column = weights + column.to(tl.int64)[None, :] * stride
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, depth, DEPTH):
        left = _rows_of(x, row, rows, at, depth, DEPTH)
        bits = tl.load(of_column + at + inner[:, None], mask=valid[None, :] & (inner < depth - at)[:, None], other=0)
        steps = bits.to(tl.int32)
        numbers = _of_fp8(steps) if FP8 else steps.to(tl.float32)
        product = tl.dot(left, numbers.to(left.dtype), input_precision="ieee")
        if GROUP:
            scale = tl.load(scales + column * groups + at // GROUP, mask=valid, other=0.0).to(tl.float32)
            product *= scale[None, :]
        summed += product
    if not GROUP:
        summed *= tl.load(scales + column, mask=valid, other=0.0).to(tl.float32)[None, :]
    _write(summed, bias, out, row, rows, column, columns, BIAS)


@triton.jit(do_not_specialize=("rows",))
def _of_halfwords(
    x, weights, scales, zeros, bias, out, rows, columns, depth, stride, groups,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Halfword i of a block has the weights i, 32 + i, 64 + i and 96 + i: a product for each of the four."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = column < columns
    of_column = weights + column.to(tl.int64)[None, :] * stride + tl.arange(0, PLANE)[:, None]
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(0, depth, PACKED):
        halfwords = tl.load(of_column + block // 4, mask=valid[None, :], other=0).to(tl.int32)
        for plane in tl.static_range(4):
            at = block + plane * PLANE
            group = tl.minimum(at // GROUP, groups - 1)  # the last block is filled up, and x is zero there
            zero = tl.full([COLUMNS], ZERO, tl.int32)
            if ZEROS:
                zero = tl.load(zeros + column * groups + group, mask=valid, other=0).to(tl.int32)
            steps = ((halfwords >> (4 * plane)) & 15) - zero[None, :]
            left = _rows_of(x, row, rows, at, depth, PLANE)
            scale = tl.load(scales + column * groups + group, mask=valid, other=0.0).to(tl.float32)
            product = tl.dot(left, steps.to(tl.float32).to(left.dtype), input_precision="ieee")
            summed += product * scale[None, :]
    _write(summed, bias, out, row, rows, column, columns, BIAS)
