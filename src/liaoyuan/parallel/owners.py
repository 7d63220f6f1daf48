"""Work on whole matrices that are sharded: each is put together at one process, its owner, and cut up again there.

So an optimiser that needs whole matrices (Muon) computes each of them once, not once in every process, and sends as
much as a gradient's reduction does (Liu et al. 2025, arXiv 2502.16982, sec. 2.3). Owners are chosen so that the work
is even. Experts are sharded by whole matrices: nothing of them travels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

Block = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class _Shared:
    """Matrices sharded over one group: their numbers, their owners, and blocks[process][matrix] of each process."""

    group: ProcessGroup
    numbers: list[int]
    owners: list[int]
    blocks: list[list[Block]]

    def owned(self, process: int) -> list[int]:
        """Return the places in `numbers` of the matrices of an owner."""
        return [place for place, owner in enumerate(self.owners) if owner == process]


class Owners:
    """Who owns which of some parameters' matrices; every process makes it with the same parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._shapes = [parameter.shape for parameter in parameters]
        self._shared = _share_out(parameters)
        shared = {number for part in self._shared for number in part.numbers}
        self._alone = [number for number in range(len(parameters)) if number not in shared]

    def gather(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the matrices that this process works on by number; parts[n] is its part of matrix n."""
        wholes = {number: parts[number] for number in self._alone}
        for shared in self._shared:
            wholes |= self._gather(shared, parts)
        return wholes

    def scatter(self, wholes: dict[int, Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's part of each matrix, of the shapes of `parts`, from what the owners computed."""
        found = {number: wholes[number] for number in self._alone}
        for shared in self._shared:
            found |= self._scatter(shared, wholes, parts)
        return [found[number] for number in range(len(parts))]

    def _gather(self, shared: _Shared, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        size, rank = shared.group.size(), shared.group.rank()
        like = parts[shared.numbers[0]]
        sent = [
            torch.cat([_flat(parts, shared, at) for at in shared.owned(p)] or [like.new_empty(0)]) for p in range(size)
        ]
        mine = shared.owned(rank)
        counts = [sum(_count(shared.blocks[p][at]) for at in mine) for p in range(size)]
        arrived = _swap(sent, counts, shared.group)
        wholes = {shared.numbers[at]: like.new_empty(self._shapes[shared.numbers[at]]) for at in mine}
        for process, pieces in enumerate(arrived):
            blocks = [shared.blocks[process][at] for at in mine]
            for at, block, piece in zip(mine, blocks, pieces.split([_count(b) for b in blocks]), strict=True):
                whole = wholes[shared.numbers[at]]
                whole[block] = piece.view(whole[block].shape)
        return wholes

    def _scatter(self, shared: _Shared, wholes: dict[int, Tensor], parts: Sequence[Tensor]) -> dict[int, Tensor]:
        size, rank = shared.group.size(), shared.group.rank()
        like = parts[shared.numbers[0]]
        mine = shared.owned(rank)
        sent = [
            torch.cat(
                [wholes[shared.numbers[at]][shared.blocks[p][at]].flatten() for at in mine] or [like.new_empty(0)]
            )
            for p in range(size)
        ]
        own = shared.blocks[rank]
        counts = [sum(_count(own[at]) for at in shared.owned(p)) for p in range(size)]
        found = {}
        for process, pieces in enumerate(_swap(sent, counts, shared.group)):
            places = shared.owned(process)
            for at, piece in zip(places, pieces.split([_count(own[at]) for at in places]), strict=True):
                found[shared.numbers[at]] = piece.view(parts[shared.numbers[at]].shape)
        return found


def _share_out(parameters: Sequence[Tensor]) -> list[_Shared]:
    """Group the matrices that are cut by the mesh dimensions over which they are, and choose owners."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor) and parameter.ndim == 2:
            dims = tuple(d for d, placed in enumerate(parameter.placements) if not placed.is_replicate())
            sharded = tuple(d for d in dims if parameter.device_mesh.size(d) > 1)
            if sharded:
                groups.setdefault((id(parameter.device_mesh), sharded), []).append(number)
    shared = []
    for (_, dims), numbers in groups.items():
        first = parameters[numbers[0]]
        assert isinstance(first, DTensor)
        mesh = first.device_mesh
        group = mesh.get_group(dims[0]) if len(dims) == 1 else _across(mesh, dims)
        blocks = [[_block(parameters[n], dims, process) for n in numbers] for process in range(group.size())]
        owners = _even_owners([parameters[n].shape for n in numbers], group.size())
        shared.append(_Shared(group, numbers, owners, blocks))
    return shared


def _across(mesh: DeviceMesh, dims: tuple[int, ...]) -> ProcessGroup:
    """Return the group of this process along several dimensions, the last one fastest."""
    names = mesh.mesh_dim_names
    assert names, "a mesh of several dimensions must name them"
    return mesh[tuple(names[d] for d in dims)]._flatten().get_group()


def _block(parameter: Tensor, dims: tuple[int, ...], process: int) -> Block:
    """Return which part of the whole the process number `process` along `dims` has, the rest of its place as ours."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    place = list(mesh.get_coordinate() or ())
    for dim in reversed(dims):
        process, place[dim] = divmod(process, mesh.size(dim))
    sizes, offsets = _compute_local_shape_and_global_offset(parameter.shape, mesh.shape, place, parameter.placements)
    return tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets, strict=True))


def _even_owners(shapes: Sequence[torch.Size], size: int) -> list[int]:
    """Give the most expensive matrix to the process with the least work so far, and so on."""
    work, owners = [0] * size, [0] * len(shapes)
    for number in sorted(range(len(shapes)), key=lambda n: -shapes[n].numel() * min(shapes[n])):
        owner = min(range(size), key=work.__getitem__)
        owners[number] = owner
        work[owner] += shapes[number].numel() * min(shapes[number])
    return owners


def _flat(parts: Sequence[Tensor], shared: _Shared, at: int) -> Tensor:
    return parts[shared.numbers[at]].flatten()


def _count(block: Block) -> int:
    return torch.Size([part.stop - part.start for part in block]).numel()


def _swap(sent: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup) -> tuple[Tensor, ...]:
    """Send sent[p] to each process p; return what came from each, of `counts` elements."""
    arrived = sent[0].new_empty(sum(counts))
    dist.all_to_all_single(arrived, torch.cat([*sent]), [*counts], [x.numel() for x in sent], group=group)
    return arrived.split([*counts])
