"""Expert parallelism: experts are spread over processes, and tokens travel to theirs and back (Lepikhin et al. 2020,
arXiv 2006.16668), dropless: every process sends as many rows as its tokens chose.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor

from liaoyuan.models import Decoder
from liaoyuan.models.experts import Dispatch, ExpertWeights, GroupedExperts, MixtureOfExperts, Router
from liaoyuan.parallel.collectives import exchange_rows
from liaoyuan.parallel.mesh import Mesh


def expert_layers(model: Decoder) -> Iterable[tuple[str, MixtureOfExperts]]:
    """Yield each mixture of experts of a stage with its name."""
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            yield name, module


def apply_expert_parallel(model: Decoder, mesh: Mesh) -> None:
    """Spread the experts of `model` over the axis ep, in place."""
    group = mesh.group("ep")
    for _, layer in expert_layers(model):
        for key, weight in list(layer.experts.named_parameters(recurse=False)):
            cut = distribute_tensor(weight.detach(), mesh.experts["ep"], [Shard(0)], src_data_rank=None)
            layer.experts._parameters[key] = nn.Parameter(cut, requires_grad=weight.requires_grad)
        layer.dispatch = all_to_all_dispatch(group)


def all_to_all_dispatch(group: ProcessGroup) -> Dispatch:
    """Return a dispatch over processes each of which holds an equal, contiguous share of the experts."""

    def dispatch(x: Tensor, chosen: Tensor, weights: Tensor, experts: GroupedExperts, count: int) -> Tensor:
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        token = order // chosen.shape[1]
        sizes = torch.bincount(flat, minlength=count)
        arriving = torch.empty_like(sizes)  # [sender, own expert]
        dist.all_to_all_single(arriving, sizes, group=group)
        sent, received = (n.view(group.size(), -1).sum(1).tolist() for n in (sizes, arriving))
        rows = exchange_rows(x[token], sent, received, group)
        by_expert, own_sizes = _sort_by_expert(arriving.view(group.size(), -1))
        out = experts(rows[by_expert], own_sizes)
        back = exchange_rows(out[by_expert.argsort()], received, sent, group)
        weighted = back * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, weighted.to(x.dtype))

    return dispatch


def _sort_by_expert(arriving: Tensor) -> tuple[Tensor, list[int]]:
    """Return the order that groups rows by expert which came grouped by sender; arriving int64 [senders, experts]."""
    expert = torch.arange(arriving.shape[1], device=arriving.device).repeat(arriving.shape[0])
    return expert.repeat_interleave(arriving.flatten()).argsort(stable=True), arriving.sum(0).tolist()


def balance(routers: Iterable[Router], rate: float, add_up: Callable[[Tensor], Tensor]) -> float:
    """Move each sigmoid router's bias towards experts that got too few tokens, and return how uneven the load was.

    Auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664): a step of `rate` against the sign of the
    excess. `add_up` sums a tensor over all processes. Returns the fullest expert's load over the mean in the worst
    layer (0 without experts). Loads are set to zero.
    """
    worst = 0.0
    for router in routers:
        load = add_up(router.load)
        mean = load.mean()
        worst = max(worst, float(load.max() / mean.clamp_min(1e-9)))
        if rate and router.experts.scoring == "sigmoid":
            router.e_score_correction_bias += rate * (mean - load).sign()
        router.load.zero_()
    return worst


def expert_weights(model: Decoder) -> list[ExpertWeights]:
    """Return the stacked experts of a stage."""
    return [layer.experts for _, layer in expert_layers(model)]
