"""The mixture-of-experts layer: softmax top-k router, dropless.

Shazeer et al. 2017 (arXiv 1701.06538); routing as in Qwen3-MoE: softmax over all experts, the k best, their
weights renormalised if `norm_topk_prob`. Every token reaches all of its k experts (no capacity limit).
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from liaoyuan.models.config import ModelConfig
from liaoyuan.ops import swiglu


class ExpertWeights(Protocol):
    """Computes one group of rows with one expert: rows [R, H], expert index -> [R, H]."""

    def __call__(self, rows: Tensor, expert: int) -> Tensor: ...


class Dispatch(Protocol):
    """Sends tokens to experts and brings the weighted results back; expert parallelism supplies another one."""

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: ExpertWeights, count: int) -> Tensor: ...


def local_dispatch(x: Tensor, chosen: Tensor, weights: Tensor, experts: ExpertWeights, count: int) -> Tensor:
    """Compute all experts in this process: x [N, H], chosen int64 [N, K], weights [N, K] -> [N, H].

    Rows are sorted by expert once, so each expert sees one contiguous group.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    token = order // chosen.shape[1]
    sizes = torch.bincount(flat, minlength=count).tolist()
    groups = x[token].split(sizes)
    results = [experts(rows, expert) for expert, rows in enumerate(groups) if rows.shape[0]]
    weighted = torch.cat(results) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, weighted.to(x.dtype))


class MixtureOfExperts(nn.Module):
    """Feed-forward layer of `num_experts` SwiGLU experts, `num_experts_per_tok` of them per token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.dispatch: Dispatch = local_dispatch

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H] -> [N, H]."""
        scores = self.router(x).float().softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return self.dispatch(x, chosen, weights.to(x.dtype), self._expert, self.router.out_features)

    def _expert(self, rows: Tensor, expert: int) -> Tensor:
        return swiglu(rows @ self.gate_up_proj[expert].t()) @ self.down_proj[expert].t()
