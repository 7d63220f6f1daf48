"""The processes that train together: who am I, how many are we, and the three things they say to each other.

`torchrun` starts the processes and tells each its place in environment variables; `start` reads them. Without
torchrun the world is one process and every exchange is free.
"""

import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from liaoyuan.device import Device
from liaoyuan.parallel.layout import Layout
from liaoyuan.parallel.mesh import Mesh, build_mesh

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class World:
    """This process is number `rank` of `size`; tensors that it exchanges live on `device`."""

    rank: int = 0
    size: int = 1
    device: Device = field(default_factory=lambda: Device("cpu"))
    mesh: Mesh | None = None  # how they are arranged; None: not yet, or alone

    def arrange(self, layout: Layout) -> "World":
        """Return the world in a layout that is resolved (`layout.resolve`); every process calls it."""
        return replace(self, mesh=build_mesh(layout, self.device)) if self.size > 1 else self

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this process works on, of `data_size`."""
        return self.mesh.data_rank if self.mesh else self.rank

    @property
    def data_size(self) -> int:
        return self.mesh.data_size if self.mesh else self.size

    @property
    def counts(self) -> bool:
        """Whether, of the processes that work on the same part of a batch, this one counts what is in it."""
        return self.mesh is None or self.mesh.is_first_of_its_data

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that talks and publishes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Return each number added up over all processes, in double precision."""
        if self.size == 1:
            return list(numbers)
        # An accelerator may lack fp64, so the exchange goes through fp32 halves only there.
        dtype = torch.float64 if self.device.is_cpu else torch.float32
        values: list[float] = self.sum(torch.tensor(numbers, dtype=dtype, device=self.device.torch)).tolist()
        return values

    def broadcast(self, text: str) -> str:
        """Return the first process's `text` in all of them."""
        if self.size == 1:
            return text
        place = self.device.torch
        raw = text.encode("utf-8")
        length = torch.tensor([len(raw)], dtype=torch.int64, device=place)
        dist.broadcast(length, src=0)
        data = torch.zeros(int(length), dtype=torch.uint8, device=place)
        if self.is_first:
            data.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return bytes(data.tolist()).decode("utf-8")

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(device: Device) -> World:
    """Join the processes that torchrun started, or return a world of one if it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    if os.environ.get("MASTER_ADDR") in LOOPBACK:
        # Processes of one machine have no reason to listen to the network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not dist.is_initialized():
        dist.init_process_group(device.collective_backend)
    return World(dist.get_rank(), dist.get_world_size(), device)
