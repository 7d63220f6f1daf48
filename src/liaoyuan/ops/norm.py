"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4), alone and joined with the residual addition."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight` over the last dimension; computed in fp32, returned in x's dtype.

    Shapes: x [..., H], weight [H] -> [..., H].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(residual + x, rms_norm(residual + x))`: [N, H], [N, H] -> ([N, H], [N, H])."""
    total = residual + x
    return total, rms_norm(total, weight, eps)
