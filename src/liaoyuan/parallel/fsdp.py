"""Fully sharded data parallelism (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3), by `fully_shard` of PyTorch.

Every process keeps 1 / size of each weight, gradient and optimiser state; a layer's weights are gathered just
before they are used. The embedding, the last norm and the head are the root's, gathered for the whole step, since
a tied embedding is used at both ends of it. Hybrid sharding keeps `dp` replicas of the sharded whole. Experts are
sharded over the processes that hold the same ones. Gradients are added up, not averaged: the loss of a process is
its own tokens' share of the global mean.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from liaoyuan.models import Decoder
from liaoyuan.parallel.expert import expert_weights
from liaoyuan.parallel.layout import Layout
from liaoyuan.parallel.mesh import Mesh
from liaoyuan.parallel.reduction import Reduction


def apply_fsdp(stage: nn.Module, model: Decoder, mesh: Mesh) -> Reduction | None:
    """Shard the weights of `model`, which `stage` wraps (or is), in place.

    Returns what must be finished after each backward pass, where gradients are not reduced by a stream of the device.
    """
    double = next(model.parameters()).dtype is torch.float64
    # Replicas add up what was reduced at once: it must be there, and wide.
    reduction = Reduction(mesh.layout.overlap) if reduces_by_exchange(mesh.layout, mesh.device.type) else None
    policy = MixedPrecisionPolicy(reduce_dtype=None if double or reduction else torch.float32)
    dense = _replicated(mesh.dense, "dp", "shard")
    units: list[tuple[nn.Module, DeviceMesh]] = [
        (experts, _replicated(mesh.experts, "dp", "expert_shard")) for experts in expert_weights(model)
    ]
    units += [(layer, dense) for layer in model.layers]
    # In a pipeline weights stay whole between microbatches. Schedules that split the backward pass need that: PyTorch
    # looks for the weights in the graph before FSDP brings them back, and loses their gradients without a word.
    between = mesh.layout.pp == 1
    units.append((stage, dense))
    for module, over in units:
        # The root is whole until its own backward pass, which comes next: to cut it between would gather it twice.
        fully_shard(module, mesh=over, mp_policy=policy, reshard_after_forward=between and module is not stage)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if reduction:
            module.set_custom_reduce_scatter(reduction)
        module._set_unshard_async_op(mesh.layout.overlap)  # devices without streams need it to overlap at all
    if mesh.layout.overlap:
        _fetch_ahead(model)
    return reduction


def reduces_by_exchange(layout: Layout, device: str) -> bool:
    """Return whether FSDP's gradients are reduced by `Reduction`: on the CPU, unless replicas add up the sums."""
    return device == "cpu" and layout.dp == 1


def _fetch_ahead(model: Decoder) -> None:
    """Let each layer ask for the next one's weights before it computes; in the backward pass FSDP does so itself."""
    layers = list(model.layers)
    for layer, following in pairwise(layers):
        parts: list[FSDPModule] = [part for part in following.modules() if isinstance(part, FSDPModule)]
        assert isinstance(layer, FSDPModule)
        layer.set_modules_to_forward_prefetch(parts)


def reshard(stages: Iterable[nn.Module]) -> None:
    """Cut up again what a forward pass without a backward pass left whole."""
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor (same storage), or the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_block(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where this process's part of a tensor begins in the whole, and its shape: a rectangular block."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets), tuple(shape)


def copies(tensor: Tensor) -> int:
    """Return how many processes of its mesh hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    pairs = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    count = 1
    for size, placed in pairs:
        count *= size if placed.is_replicate() else 1
    return count


def full_weights(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight's name and its whole tensor, one at a time; every process must go through all of them."""
    for name, parameter in named:
        weight = parameter.detach()
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


def _replicated(mesh: DeviceMesh, replicas: str, shards: str) -> DeviceMesh:
    """Return the mesh over which to shard: of two dimensions (hybrid) if there are replicas."""
    names = (replicas, shards) if mesh[replicas].size() > 1 else (shards,)
    return mesh[names]
