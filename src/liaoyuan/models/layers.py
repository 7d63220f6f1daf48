"""The small parts of a decoder layer: norm, projection, feed-forward layer."""

import torch
from torch import Tensor, nn

from liaoyuan.ops import add_rms_norm, linear, rms_norm, swiglu


class RMSNorm(nn.Module):
    """The weight of a normalisation; the layers pass it to the operator that they need."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(residual + x, norm(residual + x))`."""
        return add_rms_norm(residual, x, self.weight, self.eps)


class Linear(nn.Linear):
    """A projection by the operator of this package."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer; rows of gate and up alternate in `gate_up_proj`."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H] -> [N, H]."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))
