"""The mixture-of-experts layer: router, experts, dropless dispatch.

Shazeer et al. 2017 (arXiv 1701.06538). Every token reaches all of its k experts (no capacity limit). Routing: softmax
over all experts and the k best of them (Qwen3-MoE, Mixtral, gpt-oss), or DeepSeek's with sigmoid scores, groups and a
balancing bias; see `Experts` in `config.py`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from liaoyuan.models.config import Experts, ModelConfig
from liaoyuan.models.layers import FeedForward
from liaoyuan.ops import clamped_swiglu, combine_rows, grouped_linear, permute_rows, route, swiglu, wide

GroupedExperts = Callable[[Tensor, Tensor], Tensor]  # rows sorted by expert [R, H], number of each [E] -> [R, H]


class Dispatch(Protocol):
    """Sends tokens to experts and brings the weighted results back; expert parallelism supplies another one."""

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: GroupedExperts, count: int) -> Tensor: ...


def local_dispatch(x: Tensor, chosen: Tensor, weights: Tensor, experts: GroupedExperts, count: int) -> Tensor:
    """Compute all `count` experts in this process: x [N, H], chosen int64 [N, K], weights fp32 [N, K] -> [N, H].

    Rows are sorted by expert once, so each expert sees one contiguous group.
    """
    rows, order, sizes = permute_rows(x, chosen, count)
    return combine_rows(experts(rows, sizes), order, weights)


class Router(nn.Module):
    """Chooses each token's experts.

    `load` counts, while training, how many tokens each expert got since it was last set to zero;
    `e_score_correction_bias` [E] raises the choice, not the weight, of experts that get too few (sigmoid scores only).
    """

    load: Tensor
    e_score_correction_bias: Tensor

    def __init__(self, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        self.experts, self.counts = experts, True  # counts: not while activations are computed again
        self.weight = nn.Parameter(torch.empty(experts.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(experts.num_experts)) if experts.bias else None
        self.register_buffer("load", torch.zeros(experts.num_experts), persistent=False)
        if experts.scoring == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, H] -> weights fp32 [N, K] and chosen experts int64 [N, K]."""
        e = self.experts
        weights, chosen = route(
            self._logits(wide(x)),
            e.num_experts_per_tok,
            e.scoring,
            self.e_score_correction_bias if e.scoring == "sigmoid" else None,
            e.n_group,
            e.topk_group,
            e.group_best,
            e.norm_topk_prob,
            e.routed_scaling_factor,
        )
        if self.training and self.counts:
            with torch.no_grad():
                self.load += torch.bincount(chosen.flatten(), minlength=e.num_experts)
        return weights, chosen

    def _logits(self, x: Tensor) -> Tensor:
        # As a group of one: its bits do not depend on the number of rows, so neither does the choice.
        bias = None if self.bias is None else wide(self.bias)[None]
        return grouped_linear(x, wide(self.weight)[None], x.new_full((1,), len(x), dtype=torch.long), bias)


class ExpertWeights(nn.Module):
    """The experts' SwiGLU layers as stacked matrices; rows of gate and up alternate."""

    def __init__(self, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        count, width = experts.num_experts, experts.moe_intermediate_size
        self.limit, self.alpha = experts.swiglu_limit, experts.swiglu_alpha
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, width))
        if experts.bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(count, 2 * width))
            self.down_proj_bias = nn.Parameter(torch.empty(count, hidden_size))
        self.has_bias = experts.bias

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Pass rows [R, H], sorted by expert, `sizes[e]` of them for expert e -> [R, H]."""
        gate_up_bias, down_bias = (self.gate_up_proj_bias, self.down_proj_bias) if self.has_bias else (None, None)
        gate_up = grouped_linear(rows, self.gate_up_proj, sizes, gate_up_bias)
        hidden = clamped_swiglu(gate_up, self.limit, self.alpha) if self.limit else swiglu(gate_up)
        return grouped_linear(hidden, self.down_proj, sizes, down_bias)


class MixtureOfExperts(nn.Module):
    """Feed-forward layer of experts, `num_experts_per_tok` of them per token, and perhaps one that all tokens pass."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.gate = Router(config.hidden_size, experts)
        self.experts = ExpertWeights(config.hidden_size, experts)
        shared = experts.shared_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, shared) if shared else None
        self.dispatch: Dispatch = local_dispatch

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H] -> [N, H]."""
        weights, chosen = self.gate(x)
        out = self.dispatch(x, chosen, weights, self.experts, self.gate.experts.num_experts)
        return out if self.shared_experts is None else out + self.shared_experts(x)
