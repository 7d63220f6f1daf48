"""Fully sharded data parallelism (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3), by `fully_shard` of PyTorch.

Every process keeps 1 / size of each weight, gradient and optimiser state; a layer's weights are gathered just
before they are used. The embedding, the last norm and the head are the root's, gathered for the whole step, since
a tied embedding is used at both ends of it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from liaoyuan.models import Decoder
from liaoyuan.parallel.world import World


def shard(model: Decoder, world: World) -> Decoder:
    """Shard `model` (the same weights in every process) over the processes of `world`, in place; return it.

    Gradients are averaged over the processes in fp32. One process: nothing is done.
    """
    if world.size == 1:
        return model
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("data",))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor (same storage), or the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight's name and its whole tensor, one at a time; every process must go through all of them."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight
