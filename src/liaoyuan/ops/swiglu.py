"""SwiGLU (Shazeer 2020, arXiv 2002.05202, sec. 2): silu(gate) * up, from one merged projection."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: [N, 2 * I] -> [N, I]; gate and up alternate (gate 0, up 0, gate 1, ...)."""
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up
