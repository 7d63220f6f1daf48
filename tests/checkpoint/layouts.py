"""Models and optimisers under invented layouts, filled with values that are a function of the tensor's name.

Each layout cuts a whole tensor in plain steps of its own, so that it is an oracle for what DTensor says of offsets.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from liaoyuan.checkpoint.tensors import local_tensors, parameter_of
from liaoyuan.checkpoint.training_state import load_state, save_state
from liaoyuan.models import Decoder, ModelConfig
from liaoyuan.parallel import Program, World
from liaoyuan.training import AdamW

Cut = Callable[[str, Tensor], Tensor]  # (name of the parameter, whole tensor) -> this process's part


@dataclass(frozen=True)
class Spread:
    """A model under a layout, its optimiser, and how the layout cuts."""

    model: Decoder | Program
    optimiser: Any
    cut: Cut

    def fill(self) -> None:
        """Give every tensor of the state its own values."""
        values = {name: self.expected(name, value) for name, value in self.tensors().items()}
        for name, parameter in self.model.named_parameters():
            _local(parameter).copy_(values[f"model.{name}"])
        prefix = "optimiser."
        self.optimiser.load({n.removeprefix(prefix): x for n, x in values.items() if n.startswith(prefix)})

    def tensors(self) -> dict[str, Tensor]:
        return local_tensors(self.model, self.optimiser)

    def expected(self, name: str, like: Tensor) -> Tensor:
        """Return what this process must hold of tensor `name` after `fill`, or after a load of what was filled."""
        if name.startswith("model.") and like.dtype != torch.float32:  # the rounded copy of its master
            name = f"optimiser.{parameter_of(name)}.master"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if like.ndim == 0:
            return torch.randint(1, 99, (), generator=generator).to(like.dtype)
        parameter = dict(self.model.named_parameters())[parameter_of(name)]
        return self.cut(parameter_of(name), torch.randn(parameter.shape, generator=generator)).to(like.dtype)

    def assert_filled(self) -> None:
        for name, value in self.tensors().items():
            assert torch.equal(value, self.expected(name, value)), name


def _local(parameter: nn.Parameter) -> Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def spread(layout: str, config: ModelConfig, world: World, kind: type[Any] = AdamW) -> Spread:
    """Return a model of zeros under a layout."""
    torch.manual_seed(0)
    model = Decoder(config)
    cut = _apply(model, LAYOUTS[layout], world) if world.size > 1 else lambda _, whole: whole
    with torch.no_grad():
        for parameter in model.parameters():
            _local(parameter).zero_()
    return Spread(model, kind(model.named_parameters(), world=world), cut)


Layout = Callable[[World], Callable[[str, Tensor], tuple[DeviceMesh, list[Placement], Tensor]]]


def _apply(model: Decoder, layout: Layout, world: World) -> Cut:
    place = layout(world)
    for name, parameter in list(model.named_parameters()):
        mesh, placements, part = place(name, parameter.detach())
        whole = DTensor.from_local(
            part.contiguous(), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(whole))
    return lambda name, whole: place(name, whole)[2]


def _rows(whole: Tensor, parts: int, number: int, dim: int = 0) -> Tensor:
    """Cut as `fully_shard` does: equal parts, the last ones shorter or empty."""
    chunks = whole.chunk(parts, dim)
    return chunks[number] if number < len(chunks) else whole.narrow(dim, 0, 0)


def _fsdp(world: World) -> Any:
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
    return lambda _, whole: (mesh, [Shard(0)], _rows(whole, world.size, world.rank))


def _hsdp(world: World) -> Any:
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("outer", "inner"))
    column = mesh.get_local_rank(1)
    return lambda _, whole: (mesh, [Replicate(), Shard(0)], _rows(whole, world.size // 2, column))


def _fsdp_tp(world: World) -> Any:
    """FSDP of the first dimension over columns (the same dimension) and rows (the other) of tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("outer", "inner"))
    data, tensor, ways = mesh.get_local_rank(0), mesh.get_local_rank(1), world.size // 2

    def place(name: str, whole: Tensor) -> tuple[DeviceMesh, list[Placement], Tensor]:
        if whole.ndim == 1:  # a norm: the same in all of tensor parallelism
            return mesh, [Shard(0), Replicate()], _rows(whole, 2, data)
        if "o_proj" in name or "down_proj" in name:
            return mesh, [Shard(0), Shard(1)], _rows(_rows(whole, ways, tensor, 1), 2, data)
        placements = [_StridedShard(0, split_factor=ways), Shard(0)]
        return mesh, placements, _rows(_rows(whole, ways, tensor), 2, data)

    return place


def _two_meshes(world: World) -> Any:
    """The first layer's weights are shared out over one half of the mesh only, as experts are."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replica", "expert"))
    experts, flat = mesh["expert"], init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
    column = mesh.get_local_rank(1)

    def place(name: str, whole: Tensor) -> tuple[DeviceMesh, list[Placement], Tensor]:
        if name.startswith("layers.0."):
            return experts, [Shard(0)], _rows(whole, world.size // 2, column)
        return flat, [Shard(0)], _rows(whole, world.size, world.rank)

    return place


LAYOUTS: dict[str, Layout] = {"fsdp": _fsdp, "hsdp": _hsdp, "fsdp x tp": _fsdp_tp, "two meshes": _two_meshes}


def fill_and_save(world: World, folder: Path, layout: str, config: ModelConfig, kind: type[Any] = AdamW) -> None:
    filled = spread(layout, config, world, kind)
    filled.fill()
    save_state(folder, 1, filled.model, filled.optimiser, {"tokens": 5}, world)


def load_and_save(
    world: World, folder: Path, onto: Path | None, layout: str, config: ModelConfig, kind: type[Any] = AdamW
) -> None:
    """Load what `fill_and_save` wrote, check every tensor, and save it again."""
    loaded = spread(layout, config, world, kind)
    assert load_state(folder, loaded.model, loaded.optimiser, world) == (1, {"tokens": 5})
    loaded.assert_filled()
    if onto:
        save_state(onto, 1, loaded.model, loaded.optimiser, {"tokens": 5}, world)


__all__ = ["LAYOUTS", "Spread", "fill_and_save", "load_and_save", "spread"]
