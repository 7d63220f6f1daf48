"""The processes of a layout, as meshes: one for dense weights, one for the tokens of a sequence, one for experts.

All three number the same processes; see `layout.py` for the order.
"""

import logging
from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from liaoyuan.device import Device
from liaoyuan.parallel.layout import Layout


@dataclass(frozen=True, eq=False)
class Mesh:
    """dense: (pp, dp, shard, tp), weights are sharded over `shard` = fsdp x ring x ulysses.
    tokens: (pp, dp, fsdp, ring, ulysses, tp). experts: (pp, dp, expert_shard, ep).
    """

    layout: Layout
    dense: DeviceMesh
    tokens: DeviceMesh
    experts: DeviceMesh
    stage: ProcessGroup  # those who hold the same stages of the pipeline
    device: Device  # of each process

    def group(self, axis: str) -> ProcessGroup:
        """Return the process group of this process along an axis of `tokens`, or along "ep"."""
        return (self.experts if axis == "ep" else self.tokens).get_group(axis)

    def place(self, axis: str) -> int:
        """Return this process's number along an axis of `tokens`, or along "ep"."""
        return (self.experts if axis == "ep" else self.tokens).get_local_rank(axis)

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this process works on."""
        return self.place("dp") * self.layout.fsdp + self.place("fsdp")

    @property
    def data_size(self) -> int:
        return self.layout.dp * self.layout.fsdp

    @property
    def is_first_of_its_data(self) -> bool:
        """Whether, of all processes that work on the same part of the batch, this one counts its tokens."""
        return not any(self.place(axis) for axis in ("pp", "ring", "ulysses", "tp"))


def build_mesh(layout: Layout, device: Device) -> Mesh:
    """Return the meshes of a resolved layout; every process calls it."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # it minds gathering in steps
    kind = device.torch.type
    shard = layout.fsdp * layout.context
    dense = init_device_mesh(kind, (layout.pp, layout.dp, shard, layout.tp), mesh_dim_names=("pp", "dp", "shard", "tp"))
    tokens = init_device_mesh(
        kind,
        (layout.pp, layout.dp, layout.fsdp, layout.cp.ring, layout.cp.ulysses, layout.tp),
        mesh_dim_names=("pp", "dp", "fsdp", "ring", "ulysses", "tp"),
    )
    experts = init_device_mesh(
        kind,
        (layout.pp, layout.dp, shard * layout.tp // layout.ep, layout.ep),
        mesh_dim_names=("pp", "dp", "expert_shard", "ep"),
    )
    stage = dense["dp", "shard", "tp"]._flatten("stage").get_group()
    return Mesh(layout, dense, tokens, experts, stage, device)
