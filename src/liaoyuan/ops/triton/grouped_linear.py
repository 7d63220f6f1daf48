"""The linear layers of experts: a program takes some rows of one expert, or a tile of one expert's gradient.

Tiles begin where experts' rows do, so a row's bits depend on it and its expert alone. How many rows an expert has is
known to the device only: nothing waits for it, sizes are not checked, and rows beyond the last are not touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ceil_div, launch
from liaoyuan.ops.triton.linear import tile_of
from liaoyuan.ops.triton.product import multiply
from liaoyuan.ops.triton.softmax import find_tile


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the operator `grouped_linear`."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    _run(x.contiguous(), weight.contiguous().mT, _starts(sizes), bias, out)
    return out


def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward side of `grouped_linear`."""
    grad, x, weight, starts = grad.contiguous(), x.contiguous(), weight.contiguous(), _starts(sizes)
    grad_x, grad_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    _run(grad, weight, starts, None, grad_x)
    experts, out, width = weight.shape
    tile = tile_of(out, experts * width, x)
    row_tiles, column_tiles = ceil_div(out, tile.rows), ceil_div(width, tile.columns)
    grad_bias = grad.new_empty(experts if with_bias else 0, out)
    arguments = (grad, x, starts, grad_weight, grad_bias, x.shape[0], out, width, row_tiles, column_tiles)
    sizes_ = {"BIAS": with_bias, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    launch(_weight_gradients, (experts * row_tiles * column_tiles,), x, *arguments, **sizes_, **options)
    return grad_x, grad_weight, grad_bias


def _starts(sizes: Tensor) -> Tensor:
    """Return where each expert's rows begin, and the end: int32 [E + 1]."""
    return torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))


def _run(x: Tensor, weight: Tensor, starts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the rows of x times their experts' matrices [E, K, O], which may be transposed."""
    experts, depth, columns = weight.shape
    rows = x.shape[0]
    each = ceil_div(rows, max(1, experts))  # how many one really has is known on the device alone
    tile = tile_of(each, experts * columns, x)
    row_tiles, column_tiles = rows // tile.rows + experts if rows else 0, ceil_div(columns, tile.columns)
    arguments = (x, weight, out if bias is None else bias.contiguous(), starts, out)
    numbers = (experts, experts.bit_length(), rows, columns, depth, column_tiles, *weight.stride())
    sizes = {"BIAS": bias is not None, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    launch(_rows_of_experts, (row_tiles * column_tiles,), x, *arguments, *numbers, **sizes, **options)


@triton.jit(do_not_specialize=("rows",))
def _rows_of_experts(
    x, weight, bias, starts, out, experts, steps, rows, columns, depth, column_tiles, of_expert, of_inner, of_column,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert, first, _, end = find_tile(starts, experts, steps, tl.program_id(0) // column_tiles, ROWS)
    end = tl.minimum(end, rows)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = first + tl.arange(0, ROWS)
    matrix = weight + tl.cast(expert, tl.int64) * of_expert
    last = tl.where(first < end, depth, 0)  # a tile without rows has nothing to sum
    result = multiply(x, depth, 1, matrix, of_inner, of_column, row, end, column, columns, 0, last, DEPTH)
    if BIAS:
        own = tl.load(bias + expert * columns + column, mask=column < columns, other=0.0)
        result += own.to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=("total",))
def _weight_gradients(
    grad, x, starts, grad_weight, grad_bias, total, rows, columns, row_tiles, column_tiles,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum over one expert's rows: grad^T x, and the rows of grad for the bias."""
    expert, tile = tl.program_id(0) // (row_tiles * column_tiles), tl.program_id(0) % (row_tiles * column_tiles)
    first = tl.load(starts + expert)
    last = tl.minimum(tl.load(starts + expert + 1), total)
    row = tile // column_tiles * ROWS + tl.arange(0, ROWS)
    column = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    result = multiply(grad, 1, rows, x, columns, 1, row, rows, column, columns, first, last, DEPTH)
    at = grad_weight + (tl.cast(expert, tl.int64) * rows + row)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, result.to(grad_weight.dtype.element_ty), mask=inside)
    if BIAS and tile % column_tiles == 0:
        summed, place = tl.zeros([ROWS], tl.float32), tl.arange(0, DEPTH)
        for at_row in range(first, last, DEPTH):
            read = grad + (tl.cast(at_row, tl.int64) + place)[:, None] * rows + row[None, :]
            mask = (place < last - at_row)[:, None] & (row < rows)[None, :]
            summed += tl.sum(tl.load(read, mask=mask, other=0.0).to(tl.float32), 0)
        tl.store(grad_bias + expert * rows + row, summed.to(grad_bias.dtype.element_ty), mask=row < rows)
