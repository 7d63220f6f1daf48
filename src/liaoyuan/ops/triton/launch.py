"""How kernels are launched: the sizes of their tiles, and the device on which they run.

All sizes are in this file. They are fixed, not tuned at run time: another tile is another order of summation, and
with it other bits, so the choice may depend on a tensor's row size and dtype, never on how many rows there are. For the
same reason, and lest a new batch wait for the compiler, kernels are not specialised to numbers that belong to a batch.
Linear layers are the exception that is proved: where all their tiles give the same bits (`linear.tiles_agree`), each
number of rows has a tile that suits it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 1024  # of a program that works element by element: eight for each thread of four warps
# Of a row that a program holds whole: 32 elements for each thread of 16 warps; on Ascend what lets the seven rows of
# the widest kernel into the 96 KiB that its compiler has for tensors when it loads ahead.
MAX_WIDTH = {"cuda": 16384, "npu": 2048}
PARTIAL_SUMS = 256  # programs among which rows are dealt out for a weight's gradient: two for each of 128 processors
MAX_PROGRAMS = 65535  # of a launch that Ascend's runtime takes: kernels that work on elements or rows go round
UNBOUNDED = 2**30  # a window that no text fills
LARGE_CARD = 160 * 1024  # bytes of shared memory of a program: A100, H100 and later
WARP_GROUPS = 200 * 1024  # H100 and later
MAX_HEAD_DIM = 256  # a tile of queries, keys, values and their sums must fit a processor's registers


@dataclass(frozen=True)
class Tile:
    """A program's tile.

    rows, columns: of the scores or logits that it holds at a time, powers of two, at least 16 (the least of a product).
    depth: of the products' inner dimension at a time, where it is not held whole.
    warps: of 32 threads; stages: tiles of the inner loop that are loaded ahead. Ascend's compiler heeds neither.
    """

    rows: int
    columns: int
    depth: int = 0
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, int]:
        """Return the names under which a kernel of rows and columns takes it."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps, "num_stages": self.stages}


def fits(width: int, on: Tensor) -> bool:
    """Return whether a program can hold a row of this width whole, on the device of a tensor."""
    return width <= MAX_WIDTH.get(on.device.type, MAX_WIDTH["cuda"])


def row_warps(block: int) -> int:
    """Return the warps of a program that holds a row of `block` elements: 16 or more for each thread, as far as 16."""
    return max(1, min(16, block // 512))


# By bytes of an element and the widest head. 64 rows are the least that keep the matrix units of recent cards busy;
# fp32 has common units alone, and needs twice the room. The other sizes are the largest with which no kernel spills
# more than a few registers, or needs more shared memory than the smallest card since Ampere has (99 KiB), as compiled
# for compute capabilities 8.0 and 9.0 (`tests/ops/triton/compiled.py` prints both).
ATTENTION = {
    (2, 128): Tile(64, 64),
    (2, 256): Tile(64, 32, warps=8),
    (4, 64): Tile(32, 32),
    (4, 128): Tile(32, 32, warps=8),
    (4, 256): Tile(32, 16, warps=8, stages=1),
}
ATTENTION_BACKWARD = {
    (2, 128): Tile(64, 64, warps=8),
    (2, 256): Tile(32, 32, warps=8, stages=1),
    (4, 128): Tile(32, 32, warps=8, stages=1),
    (4, 256): Tile(16, 16, warps=8, stages=1),
}


# Where four warps multiply as one (H100 and later), a tile of 64 rows has work for four.
LARGE_BACKWARD = Tile(64, 64)


def attention_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """Return the tile of attention, forward, over whole texts or pages: one for both, so that their bits may agree."""
    return _narrowest(ATTENTION, head_dim, dtype)


def attention_backward_tile(head_dim: int, on: Tensor) -> Tile:
    """Return the tile of attention's backward pass, which holds two sums of a head's width, and four inputs."""
    if on.dtype.itemsize == 2 and 64 < head_dim <= 128 and shared_memory(on.device) >= WARP_GROUPS:
        return LARGE_BACKWARD
    return _narrowest(ATTENTION_BACKWARD, head_dim, on.dtype)


def _narrowest(tiles: Mapping[tuple[int, int], Tile], head_dim: int, dtype: torch.dtype) -> Tile:
    return next(tile for (size, widest), tile in tiles.items() if size == dtype.itemsize and head_dim <= widest)


def logits_tile(dtype: torch.dtype) -> Tile:
    """Return the tile of products of hidden states with the vocabulary."""
    if dtype is torch.float32:
        return Tile(64, 64, depth=16)
    return Tile(64, 128, depth=64, stages=3)


# Of linear layers, by how many rows there are at most: few rows wait for the weights' bytes, many for the products. Of
# two tiles the second is for weights of which the first would make too few programs. Measured on an H200.
PRODUCT = {
    16: (Tile(16, 32, depth=128, warps=2, stages=5), Tile(16, 16, depth=256, stages=5)),
    64: (Tile(64, 64, depth=64, stages=5), Tile(64, 32, depth=128, stages=4)),
    UNBOUNDED: (Tile(128, 128, depth=64, warps=8, stages=3), Tile(64, 64, depth=64, stages=5)),
}
BUSY = 80  # programs that keep a large card busy
ANY_SHAPE = Tile(64, 128, depth=64, stages=4)


def product_tile(dtype: torch.dtype, rows: int | None = None, columns: int = 0) -> Tile:
    """Return the tile of linear layers.

    rows, columns: of the result; None: they may not matter, since tiles differ in their bits here, and a token that is
        decoded has the bits of one among many.
    """
    if dtype is torch.float32:
        return Tile(64, 64, depth=16)
    if rows is None:
        return ANY_SHAPE
    wide, narrow = next(tiles for most, tiles in PRODUCT.items() if rows <= most)
    return wide if ceil_div(rows, wide.rows) * ceil_div(columns, wide.columns) >= BUSY else narrow


def roomy(tile: Tile, on: Tensor) -> Tile:
    """Return a tile with one more stage where a program has the room of a large card: no sum knows of it."""
    has_room = shared_memory(on.device) >= LARGE_CARD
    return replace(tile, stages=tile.stages + 1) if has_room else tile


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of fast memory that a program may have on a device, 0 if it does not say."""
    if device.type == "cpu":
        return 0
    properties = torch.get_device_module(device.type).get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


def quantised_tile() -> Tile:
    """Return the tile of products with weights of few bits, whose bytes are what decoding waits for: few rows."""
    return Tile(16, 64, depth=32, stages=4)


def power_of_two(n: int, least: int = 1) -> int:
    """Return the least power of two that is at least n."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def ceil_div(n: int, size: int) -> int:
    """Return how many parts of this size n things make."""
    return -(-n // size)


def programs(parts: int) -> int:
    """Return how many programs share so many parts, each taking every so-manieth."""
    return min(parts, MAX_PROGRAMS)


def launch(kernel: Any, grid: Sequence[int], on: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of a tensor; an empty grid is nothing to do."""
    if 0 in grid:
        return
    with torch.accelerator.device_index(on.device.index):
        kernel[tuple(grid)](*arguments, **options)
