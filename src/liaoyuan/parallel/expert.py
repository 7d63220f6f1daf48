"""Expert parallelism: experts are spread over processes, and tokens travel to theirs and back (Lepikhin et al. 2020,
arXiv 2006.16668), dropless: every process sends as many rows as its tokens chose.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor

from liaoyuan.models import Decoder
from liaoyuan.models.experts import Dispatch, ExpertWeights, GroupedExperts, MixtureOfExperts, Router
from liaoyuan.ops import combine_rows, permute_rows
from liaoyuan.parallel.collectives import finish_exchange, start_exchange
from liaoyuan.parallel.mesh import Mesh

CHUNKS = 2  # of a microbatch's tokens


def expert_layers(model: Decoder) -> Iterable[tuple[str, MixtureOfExperts]]:
    """Yield each mixture of experts of a stage with its name."""
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            yield name, module


def apply_expert_parallel(model: Decoder, mesh: Mesh) -> None:
    """Spread the experts of `model` over the axis ep, in place."""
    group = mesh.group("ep")
    # Experts that are sharded as well would be gathered once for each chunk.
    chunks = CHUNKS if mesh.layout.overlap and mesh.experts["expert_shard"].size() == 1 else 1
    for _, layer in expert_layers(model):
        for key, weight in list(layer.experts.named_parameters(recurse=False)):
            cut = distribute_tensor(weight.detach(), mesh.experts["ep"], [Shard(0)], src_data_rank=None)
            layer.experts._parameters[key] = nn.Parameter(cut, requires_grad=weight.requires_grad)
        layer.dispatch = all_to_all_dispatch(group, chunks)


def all_to_all_dispatch(group: ProcessGroup, chunks: int = 1) -> Dispatch:
    """Return a dispatch over processes each of which holds an equal, contiguous share of the experts.

    With several chunks of tokens, one chunk's rows travel while another's experts compute, both ways.
    """

    def dispatch(x: Tensor, chosen: Tensor, weights: Tensor, experts: GroupedExperts, count: int) -> Tensor:
        pieces = zip(x.chunk(chunks), chosen.chunk(chunks), weights.chunk(chunks), strict=True)
        trips = [Trip.start(*piece, count, group) for piece in pieces]
        for trip in trips:
            trip.compute(experts)
        return torch.cat([trip.combine() for trip in trips])

    return dispatch


class Trip:
    """The way of some tokens' rows to their experts and back."""

    def __init__(self, rows: Tensor, order: Tensor, weights: Tensor, arriving: Tensor, counts: "Counts") -> None:
        self._order, self._weights, self._arriving, self._counts = order, weights, arriving, counts
        self._rows, self._exchange = start_exchange(rows, counts.sent, counts.received, counts.group)

    @staticmethod
    def start(x: Tensor, chosen: Tensor, weights: Tensor, count: int, group: ProcessGroup) -> "Trip":
        """Send the rows of tokens x [N, H] to the experts `chosen` [N, K] of `count`."""
        rows, order, sizes = permute_rows(x, chosen, count)
        arriving = torch.empty_like(sizes)  # [sender, own expert]
        dist.all_to_all_single(arriving, sizes, group=group)
        sent, received = (n.view(group.size(), -1).sum(1).tolist() for n in (sizes, arriving))
        return Trip(rows, order, weights, arriving.view(group.size(), -1), Counts(sent, received, group))

    def compute(self, experts: GroupedExperts) -> None:
        """Let the experts compute the rows that have arrived, and send the results back."""
        rows, order, sizes = _sort_by_expert(finish_exchange(self._rows, self._exchange), self._arriving)
        out = combine_rows(experts(rows, sizes), order, rows.new_ones(len(rows), 1))
        counts = self._counts
        self._rows, self._exchange = start_exchange(out, counts.received, counts.sent, counts.group)

    def combine(self) -> Tensor:
        """Return the weighted sum of each token's results, [N, H]."""
        return combine_rows(finish_exchange(self._rows, self._exchange), self._order, self._weights)


@dataclass(frozen=True)
class Counts:
    """How many rows go to and come from each process of a group."""

    sent: list[int]
    received: list[int]
    group: ProcessGroup


def _sort_by_expert(rows: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows by expert which came grouped by sender, as `permute_rows` does; arriving int64 [senders, experts]."""
    senders, count = arriving.shape
    expert = torch.arange(count, device=arriving.device).repeat(senders).repeat_interleave(arriving.flatten())
    return permute_rows(rows, expert[:, None], count)


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
