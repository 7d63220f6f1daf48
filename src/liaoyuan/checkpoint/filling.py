"""Filling tensors, whole or this process's block of them, from the parts that a folder stores.

A part of one of our tensors is a view of it (`models/stored.py`). Of the view, only what lies in the block is read:
straight into place where runs of it are long, and else through a small buffer that stays in the processor's cache.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liaoyuan.checkpoint.weight_files import StoredTensor
from liaoyuan.models.stored import Part

LONG_RUN = 32 * 2**10  # bytes from which a read straight into place is cheaper than a further copy; measured
BUFFER = 2**20  # bytes of the small buffer; a slice that is longer makes it longer
READABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Block:
    """Where a part of a whole tensor goes: its elements `first` to `first + len(memory)`, in the order of the whole."""

    memory: Tensor  # contiguous, flat
    first: int = 0

    @property
    def last(self) -> int:
        return self.first + self.memory.numel() - 1


@dataclass(frozen=True)
class _Piece:
    """A rectangle of a part: it begins at element `start` of the file's tensor and `offset` of our whole one."""

    start: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    order: Sequence[int] | None
    dim: int  # that `order` permutes; -1 if there is none

    @property
    def last(self) -> int:
        return self.offset + sum((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))

    @property
    def width(self) -> int:
        """Elements of the file in one index of the first dimension."""
        return math.prod(self.sizes[1:])

    def rows(self, begin: int, end: int) -> "_Piece":
        """Return the indices `begin` to `end` of the first dimension."""
        return replace(
            self,
            start=self.start + begin * self.width,
            offset=self.offset + begin * self.strides[0],
            sizes=(end - begin, *self.sizes[1:]),
        )

    def row(self, index: int) -> "_Piece":
        """Return one index of the first dimension, without that dimension."""
        theirs = self.order[index] if self.order and self.dim == 0 else index
        return _Piece(
            self.start + theirs * self.width,
            self.offset + index * self.strides[0],
            self.sizes[1:],
            self.strides[1:],
            None if self.dim == 0 else self.order,
            max(self.dim - 1, -1),
        )


class Filler:
    """Fills blocks; keeps the small buffer from one part to the next."""

    def __init__(self) -> None:
        self._buffer = torch.empty(BUFFER, dtype=torch.uint8)

    def fill(self, block: Block, part: Part, stored: StoredTensor) -> None:
        """Read what of `part`, a view of the whole tensor (on any device, meta too), lies in `block`.

        Raises:
            LiaoyuanError: the file cannot be read to its end.
        """
        view = part.view
        dim = part.dim if part.order else -1
        whole = _Piece(0, int(view.storage_offset()), tuple(view.shape), tuple(view.stride()), part.order, dim)
        if not view.numel() or not block.memory.numel():
            return
        for piece in _within(whole, block.first, block.last):
            runs = _runs(piece, block, stored)
            if runs is None:
                self._copy(piece, block, stored)
            else:
                stored.read(runs, piece.start * block.memory.element_size())

    def _copy(self, piece: _Piece, block: Block, stored: StoredTensor) -> None:
        """Read slice by slice through the buffer: other dtype, order or device, or short runs."""
        dtype = READABLE[stored.dtype]
        if len(piece.sizes) > 1 and piece.dim != 0 and piece.width * dtype.itemsize > BUFFER:
            for index in range(piece.sizes[0]):
                self._copy(piece.row(index), block, stored)
            return
        if not piece.sizes or piece.dim == 0:
            dim = piece.dim + (piece.dim >= 0)
            piece = replace(piece, sizes=(1, *piece.sizes), strides=(1, *piece.strides), dim=dim)
        rows = max(1, BUFFER // (piece.width * dtype.itemsize))
        for begin in range(0, piece.sizes[0], rows):
            part = piece.rows(begin, min(begin + rows, piece.sizes[0]))
            theirs = self._read(part, stored, dtype)
            if part.order:
                theirs = theirs.index_select(part.dim, torch.tensor(part.order))
            block.memory.as_strided(
                part.sizes, part.strides, block.memory.storage_offset() + part.offset - block.first
            ).copy_(theirs)

    def _read(self, piece: _Piece, stored: StoredTensor, dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(piece.sizes) * dtype.itemsize
        if nbytes > len(self._buffer):
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        buffer = self._buffer[:nbytes]
        stored.read([memoryview(buffer.numpy())], piece.start * dtype.itemsize)  # type: ignore[arg-type]
        return buffer.view(dtype).view(piece.sizes)


def _within(piece: _Piece, first: int, last: int) -> Iterator[_Piece]:
    """Yield the rectangles of `piece` whose elements of our whole tensor lie between `first` and `last`."""
    if first <= piece.offset and piece.last <= last:
        yield piece
    elif piece.offset <= last and first <= piece.last:
        count = piece.sizes[0]
        if count == 1 or piece.dim == 0:
            for index in range(count):
                yield from _within(piece.row(index), first, last)
        else:
            yield from _within(piece.rows(0, count // 2), first, last)
            yield from _within(piece.rows(count // 2, count), first, last)


def _runs(piece: _Piece, block: Block, stored: StoredTensor) -> list[memoryview] | None:
    """Return the memory that the piece fills, in the order of the file; None if it must be copied there."""
    memory = block.memory
    if piece.order or memory.dtype != READABLE[stored.dtype] or not memory.is_cpu:
        return None
    run, outer = 1, len(piece.sizes)
    while outer and (piece.strides[outer - 1] == run or piece.sizes[outer - 1] == 1):
        run *= piece.sizes[outer - 1]
        outer -= 1
    width = memory.element_size()
    if outer and run * width < LONG_RUN:
        return None
    starts = [piece.offset - block.first]
    for size, step in zip(piece.sizes[:outer], piece.strides[:outer], strict=True):
        starts = [start + index * step for start in starts for index in range(size)]
    # Not through numpy: what numpy has seen can never give its memory back (`Engine.sleep`).
    raw = memoryview((ctypes.c_uint8 * memory.nbytes).from_address(memory.data_ptr())).cast("B")
    return [raw[start * width : (start + run) * width] for start in starts]
