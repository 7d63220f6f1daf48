"""The linear layer: a program takes a tile of the result and sums over the whole inner dimension, in one order.

A vendor's product is chosen by the number of rows, so that a row has other bits in another batch; this one is not.
"""

import functools
import logging
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import PRODUCT, Tile, ceil_div, launch, product_tile, roomy
from liaoyuan.ops.triton.product import multiply, tile_place

_log = logging.getLogger("liaoyuan.ops")

AGREEING = (130, 208, 528)  # rows, columns and inner dimension of the product on which tiles are compared


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Compute the operator `linear`."""
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    _run(_by_rows, x, weight.t(), bias, residual, out)
    return out


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward side of `linear`."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x, grad_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    _run(_by_rows, grad, weight, None, None, grad_x)
    _run(_over_rows, grad.t(), x, None, None, grad_weight)
    return grad_x, grad_weight, grad.sum(0) if with_bias else grad.new_empty(0)


def tile_of(rows: int, columns: int, on: Tensor) -> Tile:
    """Return the tile for a result of so many rows and columns, in the dtype and on the device of a tensor."""
    return roomy(product_tile(on.dtype, rows if tiles_agree(on.dtype, on.device) else None, columns), on)


@functools.cache
def tiles_agree(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a row has the same bits in every tile on this device.

    All sum over the inner dimension in one order, but a compiler may take other instructions for another tile, and
    these may round otherwise: so it is tried, once, on numbers of very different sizes. Where one of them does not
    compile, or asks for more than a program may have, there is but the one tile, too.
    """
    if dtype is torch.float32:
        return False  # it has one tile
    numbers = torch.Generator().manual_seed(1)
    left, right = (torch.randn(rows, AGREEING[2], generator=numbers) for rows in AGREEING[:2])
    spread = 4.0 ** torch.randint(-4, 5, left.shape, generator=numbers)
    x, weight = (left * spread).to(device, dtype), right.to(device, dtype)

    def product(rows: int, tile: Tile) -> Tensor:
        out = x.new_empty(rows, weight.shape[0])
        _run(_by_rows, x[:rows], weight.t(), None, None, out, tile)
        return out

    expected = product(len(x), product_tile(dtype))
    tiles = [(min(most, len(x)), roomy(tile, x)) for most, pair in PRODUCT.items() for tile in pair]
    try:
        equal = [torch.equal(product(rows, tile), expected[:rows]) for rows, tile in tiles]  # all are compiled
    except Exception as error:  # each compiler has its own
        _log.warning("Linear layers have one tile on %s: another one fails (%s).", device, error)
        return False
    return all(equal)


def _run(
    kernel: Any,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """Write left @ right + bias + residual to `out`; left and right may be transposed."""
    (rows, depth), columns = left.shape, right.shape[1]
    tile = tile or tile_of(rows, columns, left)
    grid = (ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns),)
    added = [out if x is None else x.contiguous() for x in (bias, residual)]
    arguments = (left, right, *added, out)
    numbers = (rows, columns, depth, *left.stride(), *right.stride())
    flags = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    launch(kernel, grid, out, *arguments, *numbers, **flags, **sizes, **options)


def _product(
    left, right, bias, residual, out, rows, columns, depth, left_row, left_inner, right_inner, right_column,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write one tile of the product."""
    at_row, at_column = tile_place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
    row, column = at_row * ROWS + tl.arange(0, ROWS), at_column * COLUMNS + tl.arange(0, COLUMNS)
    result = multiply(
        left, left_row, left_inner, right, right_inner, right_column, row, rows, column, columns, 0, depth, DEPTH
    )
    if BIAS:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


# the number that is the batch's: of a batch times a matrix the rows, of a weight's gradient the inner dimension
_by_rows = triton.jit(_product, do_not_specialize=("rows",))
_over_rows = triton.jit(_product, do_not_specialize=("depth",))
