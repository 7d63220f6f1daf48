"""Who writes what: made by the planner of `torch.distributed.checkpoint` at the first save, and kept.

Every process tells the first one which blocks of which tensors it holds; DCP gives each block that several hold to
the one with the least to write, and checks that the blocks make up the whole tensors. What is exchanged is JSON: DCP's
own exchange pickles. Later saves exchange nothing.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from liaoyuan.checkpoint.tensors import DTYPES, TORCH_DTYPES
from liaoyuan.checkpoint.writer import Piece
from liaoyuan.parallel import World

ALIGNMENT = 64  # bytes, of the two halves of the staging buffer


@dataclass(frozen=True)
class PartPlan:
    """What this process writes into a state (`own`), and what it holds but others write (`spare`)."""

    own: tuple[Piece, ...]
    spare: tuple[Piece, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (*self.own, *self.spare)

    @property
    def nbytes(self) -> int:
        """Bytes of a staging buffer that holds all pieces."""
        return max((piece.start + piece.nbytes for piece in self.pieces), default=0)

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors`, this process's local parts, are those that were planned."""
        planned = {piece.name: (piece.shape, piece.dtype) for piece in self.pieces}
        return planned == {name: (tuple(x.shape), DTYPES[x.dtype]) for name, x in tensors.items() if x.numel()}


def make_plan(tensors: Mapping[str, Tensor], world: World) -> PartPlan:
    """Plan the save of `tensors` (of `whole_tensors`). Every process of `world` calls it at the same time.

    Raises:
        ValueError: the blocks that the processes hold overlap or leave gaps.
    """
    planner = _planner(tensors, world)
    items = [item for item in planner.create_local_plan().items if _block(item).sizes.numel()]
    mine = _own_names(items, planner, world)
    own = _laid_out([item for item in items if item.index.fqn in mine], 0)
    end = sum(piece.nbytes for piece in own)
    spare = _laid_out([item for item in items if item.index.fqn not in mine], end + -end % ALIGNMENT)
    return PartPlan(own, spare)


def _planner(tensors: Mapping[str, Tensor], world: World) -> DefaultSavePlanner:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=world.is_first)
    return planner


def _own_names(items: list[WriteItem], planner: DefaultSavePlanner, world: World) -> set[str]:
    """Return the names of the tensors whose block this process writes."""
    if world.size == 1:
        return {item.index.fqn for item in items}
    told = _gather(json.dumps([_to_json(item) for item in items]), world)
    answers = None
    if told is not None:
        plans = [SavePlan([_from_json(item) for item in json.loads(text)]) for text in told]
        chosen, _ = planner.create_global_plan(plans)
        answers = [json.dumps([item.index.fqn for item in plan.items]) for plan in chosen]
    return set(json.loads(_scatter(answers, world)))


def _laid_out(items: list[WriteItem], start: int) -> tuple[Piece, ...]:
    """Return the pieces, one behind the other from byte `start`; wide elements first, so that all are aligned."""
    pieces = []
    for item in sorted(items, key=lambda item: (-_dtype(item).itemsize, item.index.fqn)):
        block = _block(item)
        shape, offsets, size = tuple(block.sizes), tuple(block.offsets), tuple(_data(item).size)
        nbytes = _dtype(item).itemsize * math.prod(shape)
        pieces.append(Piece(item.index.fqn, DTYPES[_dtype(item)], shape, offsets, size, start, nbytes))
        start += nbytes
    return tuple(pieces)


def _to_json(item: WriteItem) -> list[Any]:
    block, is_shard = _block(item), item.type is WriteItemType.SHARD
    return [item.index.fqn, is_shard, DTYPES[_dtype(item)], [*_data(item).size], [*block.offsets], [*block.sizes]]


def _from_json(values: list[Any]) -> WriteItem:
    name, is_shard, dtype, size, offsets, sizes = values
    properties = TensorProperties(dtype=TORCH_DTYPES[dtype])
    block = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    kind = WriteItemType.SHARD if is_shard else WriteItemType.TENSOR
    data = TensorWriteData(block, properties, torch.Size(size))
    return WriteItem(MetadataIndex(name, torch.Size(offsets)), kind, tensor_data=data)


def _dtype(item: WriteItem) -> torch.dtype:
    return _data(item).properties.dtype


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None  # a state holds nothing but tensors
    return item.tensor_data


def _block(item: WriteItem) -> ChunkStorageMetadata:
    return _data(item).chunk


def _gather(text: str, world: World) -> list[str] | None:
    """Return the texts of all processes, in the first one; None in the others."""
    raw = text.encode()
    lengths = torch.zeros(world.size, dtype=torch.int64, device=world.device.torch)
    lengths[world.rank] = len(raw)
    most = int(world.sum(lengths).max())
    padded = _padded(raw, most, world)
    found = [torch.empty_like(padded) for _ in range(world.size)] if world.is_first else None
    dist.gather(padded, found)
    if found is None:
        return None
    return [bytes(data[:length].tolist()).decode() for data, length in zip(found, lengths.tolist(), strict=True)]


def _scatter(texts: list[str] | None, world: World) -> str:
    """Return this process's own of the `texts`, which the first process has."""
    lengths = torch.zeros(world.size, dtype=torch.int64, device=world.device.torch)
    raws = [text.encode() for text in texts or ()]
    if texts is not None:
        lengths.copy_(torch.tensor([len(raw) for raw in raws]))
    world.sum(lengths)
    most = int(lengths.max())
    mine = _padded(b"", most, world)
    dist.scatter(mine, [_padded(raw, most, world) for raw in raws] if texts is not None else None)
    return bytes(mine[: int(lengths[world.rank])].tolist()).decode()


def _padded(raw: bytes, length: int, world: World) -> Tensor:
    data = torch.zeros(length, dtype=torch.uint8)
    data[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else data[:0]
    return data.to(world.device.torch)
