"""Reading a state back, under any layout: DCP plans which part of which saved block each process needs.

Every block that is used is checked against its checksum. Before anything is read, it is checked that the state has
all that the model and the optimiser ask for, that its blocks make up whole tensors, and that it has nothing that
nobody asks for: a moment that got lost is an error that names it.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from liaoyuan.checkpoint.tensors import TORCH_DTYPES
from liaoyuan.checkpoint.writer import FORMAT, MANIFEST, checksum_of
from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import World


class Damaged(Exception):  # noqa: N818  (what a state is, not what this code did)
    """A file of the state is missing, torn, or not what its checksum says."""


def read_manifest(state: Path) -> dict[str, Any]:
    """Return what `state.json` says.

    Raises:
        Damaged: it is missing or torn.
        LiaoyuanError: it is of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads((state / MANIFEST).read_text(encoding="utf-8"))
        found, format_ = manifest.get("crc32"), manifest.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(str(error)) from error
    if format_ != FORMAT and "crc32" not in manifest:
        raise LiaoyuanError(f"{state} was written by another version of this program (format {format_}).")
    if found != checksum_of(manifest):
        raise Damaged(f"{state / MANIFEST} does not agree with its checksum")
    return manifest


def refuse_incomplete(manifest: Mapping[str, Any], wanted: Mapping[str, Tensor], state: Path, world: World) -> None:
    """Check that the state has exactly the tensors that the processes together want.

    `wanted` are this process's, with the shape of the whole (`whole_tensors`).

    Raises:
        LiaoyuanError: in every process, and names the tensor.
    """
    saved = manifest["tensors"]
    lacking = next((f"lacks '{name}'" for name in sorted(wanted) if name not in saved), "")
    lacking = lacking or next((f"lacks a part of '{name}'" for name in sorted(saved) if not is_whole(saved[name])), "")
    lacking = lacking or _of_another_shape(saved, wanted)
    names = sorted(saved)
    asked = world.sum(torch.tensor([float(name in wanted) for name in names], device=world.device.torch))
    unasked = [name for name, count in zip(names, asked.tolist(), strict=True) if not count]
    if unasked and not lacking:
        lacking = f"holds '{unasked[0]}', which the model and its optimiser do not have"
    (failed,) = world.sum_numbers(float(bool(lacking)))
    if failed:
        why = lacking or "does not have what another process asks for"
        raise LiaoyuanError(f"{state} {why}: going on from it would lose a part of the training's state.")


def read_tensors(state: Path, manifest: Mapping[str, Any], into: dict[str, Tensor]) -> None:
    """Fill the tensors `into` (whole, or DTensors), in place, from a state that any layout wrote.

    Raises:
        Damaged: a block that is needed is missing or not what its checksum says; some tensors may be filled.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(into), _metadata(manifest), is_coordinator=True)
    blocks = _Blocks(state, manifest)
    for item in planner.create_local_plan().items:
        if math.prod(item.lengths):
            with torch.no_grad():
                planner.resolve_tensor(item).copy_(_part(blocks.read(item.storage_index), item))


class _Blocks:
    """The blocks of a state's files, each checked as it is read."""

    def __init__(self, state: Path, manifest: Mapping[str, Any]) -> None:
        self._state, self._files = state, manifest["files"]
        self._opened: dict[str, Any] = {}
        self._where = {
            (name, tuple(offsets)): (self._files[number], checksum)
            for name, entry in manifest["tensors"].items()
            for number, offsets, _, checksum in entry["pieces"]
        }
        self._last: tuple[MetadataIndex, Tensor] | None = None

    def read(self, index: MetadataIndex) -> Tensor:
        if self._last is None or self._last[0] != index:
            self._last = index, self._read(index)
        return self._last[1]

    def _read(self, index: MetadataIndex) -> Tensor:
        file, checksum = self._where[index.fqn, tuple(index.offset or ())]
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(self._state / file, framework="pt")
            tensor: Tensor = self._opened[file].get_tensor(index.fqn)
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{self._state / file}: {error}") from error
        if checksum != crc32(tensor):
            raise Damaged(f"{self._state / file}: '{index.fqn}' does not agree with its checksum")
        return tensor


def crc32(tensor: Tensor) -> str:
    """Return the checksum of a tensor's bytes."""
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy()):08x}"  # type: ignore[arg-type]


def _part(block: Tensor, item: ReadItem) -> Tensor:
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        block = block.narrow(dim, start, length)
    return block


def _metadata(manifest: Mapping[str, Any]) -> Metadata:
    return Metadata({name: _storage(entry) for name, entry in manifest["tensors"].items()})


def _storage(entry: Mapping[str, Any]) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)) for _, offsets, shape, _ in entry["pieces"]]
    properties = TensorProperties(dtype=TORCH_DTYPES[entry["dtype"]])
    return TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)


def is_whole(entry: Mapping[str, Any]) -> bool:
    """Return whether the blocks of a saved tensor make up the whole of it."""
    return sum(math.prod(shape) for _, _, shape, _ in entry["pieces"]) == math.prod(entry["size"])


def _of_another_shape(saved: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> str:
    for name, tensor in wanted.items():
        if tuple(saved[name]["size"]) != tuple(tensor.shape):
            return f"has '{name}' of shape {saved[name]['size']}, not {list(tensor.shape)}"
    return ""
