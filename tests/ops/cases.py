"""Inputs for every operator, and what is asked of a result."""

from collections.abc import Sequence

import torch
from torch import Tensor

RAGGED = {
    "one token": (1,),
    "short documents": (3, 1, 2),
    "empty documents": (0, 5, 0, 40, 0, 0),
    "block ends": (31, 32, 33, 64),
    "longer than a chunk": (600, 20),
}


def boundaries_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attend each document on its own, in fp64, from the definition."""
    groups = query.shape[1] // key.shape[1]
    parts = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        future = torch.ones(len(q), len(q)).triu(1).bool()
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v))
    return torch.cat(parts)


def difference(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Return max |actual - expected| / max |expected|, the latter at least `floor`."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(floor))
