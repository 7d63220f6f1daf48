"""Writing weights as safetensors, one tensor at a time: where each goes is planned before the first is there.

Names and the index are those of Hugging Face: `model.safetensors`, or `model-00001-of-00003.safetensors` and
`model.safetensors.index.json`.
"""

import json
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liaoyuan.checkpoint.counting import Count
from liaoyuan.checkpoint.weight_files import INDEX, WEIGHTS
from liaoyuan.rundir import Report, silent

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Slot:
    """A tensor that will be written: its form, and once it is planned its file and its first byte after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = WEIGHTS
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(slots: Iterable[Slot], max_shard_bytes: int) -> list[Slot]:
    """Return the slots with their places: files are filled in order; a tensor longer than a file gets its own."""
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shards[-1] and filled + slot.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.nbytes
    return [slot for number, shard in enumerate(shards, 1) for slot in _placed(shard, _name(number, len(shards)))]


def _name(number: int, count: int) -> str:
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _placed(shard: list[Slot], file: str) -> list[Slot]:
    placed, end = [], 0
    for slot in sorted(shard, key=lambda slot: -slot.dtype.itemsize):  # wide ones first, so that all are aligned
        placed.append(Slot(slot.name, slot.dtype, slot.shape, file, end))
        end += slot.nbytes
    return placed


class ShardWriter:
    """Writes the tensors of a plan into `folder`, in any order. A context; ends with the index, if there are shards."""

    def __init__(self, folder: Path, slots: list[Slot], report: Report = silent) -> None:
        self._folder = folder
        self._slots = {slot.name: slot for slot in slots}
        self._missing = dict.fromkeys(self._slots)
        self._total = sum(slot.nbytes for slot in slots)
        self._count = Count(self._total, report)
        self._files: dict[str, tuple[int, int]] = {}  # handle, length of the header
        self._opened = ExitStack()

    def __enter__(self) -> "ShardWriter":
        for file in dict.fromkeys(slot.file for slot in self._slots.values()):
            handle = self._opened.enter_context((self._folder / file).open("wb", buffering=0)).fileno()
            header = _header([slot for slot in self._slots.values() if slot.file == file])
            _write(handle, memoryview(header), 0)
            self._files[file] = handle, len(header)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._opened.close()
        if kind is None and len(self._files) > 1:
            places = {slot.name: slot.file for slot in self._slots.values()}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(places.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def missing(self) -> list[str]:
        """The tensors that have not been written yet."""
        return list(self._missing)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, contiguous and on the CPU, of the dtype and shape that was planned.

        Raises:
            OSError: as the disk says.
        """
        slot = self._slots[name]
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {slot.dtype} {slot.shape}")
        handle, header = self._files[slot.file]
        _write(handle, memoryview(tensor.view(-1).view(torch.uint8).numpy()), header + slot.start)  # type: ignore[arg-type]
        self._missing.pop(name, None)
        self._count.add(slot.nbytes)


def _header(slots: Iterable[Slot]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    for slot in slots:
        place = [slot.start, slot.start + slot.nbytes]
        header[slot.name] = {"dtype": DTYPES[slot.dtype], "shape": slot.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(handle: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(handle, data, place)
        data, place = data[count:], place + count
