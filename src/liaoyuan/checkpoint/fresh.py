"""A training state of step 0 made from weights: what `train` goes on from as if it had begun with them.

It has no history: the optimiser's moments are zero, its fp32 masters are the weights.
"""

import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from liaoyuan.checkpoint.convert import refuse_without_room
from liaoyuan.checkpoint.counting import Count
from liaoyuan.checkpoint.reading import Damaged
from liaoyuan.checkpoint.sources import Source, damaged
from liaoyuan.checkpoint.tensors import DTYPES, MODEL, OPTIMISER, TORCH_DTYPES, Optimiser
from liaoyuan.checkpoint.training_state import identity_of
from liaoyuan.checkpoint.writer import TEMPORARY, Piece, part_name, publish, state_name, write_part
from liaoyuan.models import Decoder
from liaoyuan.rundir import Report, disk_errors, silent


def write_fresh_state(
    source: Source,
    folder: Path,
    model: Decoder,
    optimiser: Optimiser,
    extra: Mapping[str, Any],
    report: Report = silent,
) -> int:
    """Write `folder/step-000000` and return its bytes; one tensor at a time is in memory.

    `model` and its `optimiser` say what is in a state and may be on the meta device; the values are those of `source`.

    Raises:
        LiaoyuanError: the source is damaged or the disk is full; nothing is written.
    """
    forms = {MODEL + name: tensor for name, tensor in model.state_dict().items()}
    forms |= {OPTIMISER + name: tensor for name, tensor in optimiser.state().items()}
    pieces = sorted(map(_piece, forms, forms.values()), key=lambda piece: -TORCH_DTYPES[piece.dtype].itemsize)
    refuse_without_room(folder, sum(piece.nbytes for piece in pieces))
    part = folder / f"{TEMPORARY}{state_name(0)}-{secrets.token_hex(4)}"
    manifest = {"step": 0, **identity_of(model, optimiser), "extra": extra}
    try:
        with disk_errors(folder):
            write_part(part / part_name(0), pieces, _Values(pieces, _reader(source, model), report), {"step": 0})
            publish(part, folder / state_name(0), 1, manifest, lambda: False)
    except Damaged as error:
        raise damaged(source.folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sum(piece.nbytes for piece in pieces)


def _piece(name: str, form: Tensor) -> Piece:
    shape = tuple(form.shape)
    return Piece(name, DTYPES[form.dtype], shape, (0,) * len(shape), shape, 0, form.nbytes)


def _reader(source: Source, model: Decoder) -> Callable[[Piece], Tensor]:
    own, wide = source.reader(model.config), source.reader(replace(model.config, dtype="float32"))

    def read(piece: Piece) -> Tensor:
        if piece.name.startswith(MODEL):
            return own(piece.name.removeprefix(MODEL), torch.Size(piece.shape))
        name, _, key = piece.name.removeprefix(OPTIMISER).rpartition(".")
        if key == "master":
            return wide(name, torch.Size(piece.shape))
        return torch.zeros(piece.shape, dtype=TORCH_DTYPES[piece.dtype])

    return read


class _Values(Sequence[memoryview]):
    """The bytes of the pieces, read anew each time they are gone through: for the checksums, then to be written."""

    def __init__(self, pieces: list[Piece], read: Callable[[Piece], Tensor], report: Report) -> None:
        self._pieces, self._read, self._report = pieces, read, report
        self._count = Count(2 * sum(piece.nbytes for piece in pieces), report)

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | Sequence[memoryview]:
        if isinstance(index, slice):
            return _Values(self._pieces[index], self._read, self._report)
        piece = self._pieces[index]
        value = self._read(piece).contiguous()
        assert value.dtype == TORCH_DTYPES[piece.dtype] and value.numel() == math.prod(piece.shape)
        return memoryview(value.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[memoryview]:
        for index, piece in enumerate(self._pieces):
            yield self[index]
            self._count.add(piece.nbytes)
