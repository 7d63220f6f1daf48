"""The safetensors files of a folder, read without a second copy: bytes go straight to where they belong.

Mapping the files would let their pages count as this process's memory beside the weights, so files are read. The
format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, place), then the tensors without a gap
(https://github.com/huggingface/safetensors). Pickles are never opened.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from liaoyuan.errors import LiaoyuanError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "*.pt", "*.pth", "*.bin")
HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors library
WIDTHS = {  # bytes of an element
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}
MOST_BUFFERS = 1024  # of one read, IOV_MAX of Linux


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `dtype` as safetensors spells it, and where its bytes begin."""

    path: Path
    handle: int
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, buffers: list[memoryview], skip: int) -> None:
        """Fill the buffers one after another with the bytes from `skip` on.

        Raises:
            LiaoyuanError: the file has become shorter, or the disk cannot read it.
        """
        place = self.start + skip
        for first in range(0, len(buffers), MOST_BUFFERS):
            left = [buffer for buffer in buffers[first : first + MOST_BUFFERS] if buffer.nbytes]
            while left:
                count = self._read(left, place)
                place += count
                left = _after(left, count)

    def _read(self, buffers: list[memoryview], place: int) -> int:
        try:
            count = os.preadv(self.handle, buffers, place)
        except OSError as error:
            raise _corrupt(self.path, error.strerror) from error
        if not count:
            raise _corrupt(self.path, "it ends too early")
        return count


class WeightFiles:
    """The tensors of a folder by name, from one file or from the shards of an index. A context: it holds files open."""

    def __init__(self, folder: Path) -> None:
        """Open the files and check their headers; nothing else is read.

        Raises:
            LiaoyuanError: there are no weights, a file is missing or torn, or the index is wrong.
        """
        self._opened = ExitStack()
        self._tensors: dict[str, StoredTensor] = {}
        with ExitStack() as opened:
            for name in shard_names(folder):
                file = opened.enter_context(_open(folder / name))
                self._tensors |= _tensors(folder / name, file)
            self._opened = opened.pop_all()
        self.folder = folder

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise LiaoyuanError(f"{self.folder}: the weights lack '{name}', which config.json asks for.")
        return self._tensors[name]


def shard_names(folder: Path) -> list[str]:
    """Return the names of a folder's weight files; raises LiaoyuanError if there are none, or the index is wrong."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        hint = f" {pickles[0]} is a pickle, which is never opened: save it as safetensors." if pickles else ""
        raise LiaoyuanError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} is there.{hint}")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        outside = next((name for name in names if Path(name).name != name), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LiaoyuanError(f"{folder / INDEX} is not a valid weight index.") from error
    if outside is not None:
        raise LiaoyuanError(f"{folder / INDEX} points outside its folder ('{outside}').")
    foreign = next((name for name in names if not name.endswith(".safetensors")), None)
    if foreign is not None:
        raise LiaoyuanError(f"{folder / INDEX} names '{foreign}', which is not a safetensors file.")
    return names


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise LiaoyuanError(f"The weight file {path} is missing.") from None
    except OSError as error:
        raise LiaoyuanError(f"The weight file {path} cannot be opened: {error.strerror}.") from error


def _tensors(path: Path, file: IO[bytes]) -> dict[str, StoredTensor]:
    """Return the tensors of a file, which must lie in it without a gap and fill it."""
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, HEADER_LIMIT):
            raise ValueError("its header is cut off")
        header = json.loads(_whole(file, length))
        header.pop("__metadata__", None)
        end = _check(header)
        if 8 + length + end != size:
            raise ValueError(f"it has {size:,} bytes, not the {8 + length + end:,} that its header says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, error) from error
    start = 8 + length
    return {
        name: StoredTensor(path, file.fileno(), x["dtype"], tuple(x["shape"]), start + x["data_offsets"][0])
        for name, x in header.items()
    }


def _whole(file: IO[bytes], length: int) -> bytes:
    data = b""
    while len(data) < length and (more := file.read(length - len(data))):
        data += more
    return data


def _check(header: Mapping[str, Any]) -> int:
    """Return where the last tensor ends; raises ValueError if a tensor's place does not fit its shape."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        count = math.prod(int(size) for size in entry["shape"])
        if start != end or stop - start != count * WIDTHS[entry["dtype"]] or min(entry["shape"], default=0) < 0:
            raise ValueError(f"'{name}' is not where it should be")
        end = stop
    return end


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of the buffers when their first `count` bytes are filled."""
    for number, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[number + 1 :]]
        count -= buffer.nbytes
    return []


def _corrupt(path: Path, why: object) -> LiaoyuanError:
    return LiaoyuanError(f"The weight file {path} is truncated or corrupt ({why}); copy it again.")
