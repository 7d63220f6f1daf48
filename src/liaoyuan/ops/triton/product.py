"""The product that all linear layers are made of: its sum has one order, whatever the number of rows.

The inner dimension is taken from its beginning on, a fixed number of elements at a time, by one program: it is never
split among several, so that a row's bits depend on that row, the matrix and the tile alone.
"""

import triton
import triton.language as tl

NEIGHBOURS = tl.constexpr(8)  # tiles of rows that are worked on together, and so read the same columns from the cache


@triton.jit
def multiply(
    left, left_row, left_inner, right, right_inner, right_column, row, rows, column, columns, first, last,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Return the sum over i from first to last - 1 of left[row, i] * right[i, column], fp32.

    left_row, left_inner, right_inner, right_column are strides; rows and columns from `rows` and `columns` on are zero.
    """
    inner = tl.arange(0, DEPTH)
    from_left = left + row.to(tl.int64)[:, None] * left_row
    from_right = right + column.to(tl.int64)[None, :] * right_column
    summed = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for at in range(first, last, DEPTH):
        place, inside = tl.cast(at, tl.int64) + inner, inner < last - at
        x = tl.load(from_left + place[None, :] * left_inner, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        w = tl.load(
            from_right + place[:, None] * right_inner, mask=(column < columns)[None, :] & inside[:, None], other=0.0
        )
        summed += tl.dot(x, w, input_precision="ieee")
    return summed


@triton.jit
def tile_place(tile, row_tiles, column_tiles):
    """Return the row and column of a tile, in an order in which neighbours share what they read."""
    band = tile // (NEIGHBOURS * column_tiles)
    height = tl.minimum(row_tiles - band * NEIGHBOURS, NEIGHBOURS)
    rest = tile - band * NEIGHBOURS * column_tiles
    return band * NEIGHBOURS + rest % height, rest // height
