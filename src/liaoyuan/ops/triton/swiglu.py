"""SwiGLU: gate and up lie side by side, so a program reads pairs and takes them apart."""

import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ELEMENTS, ceil_div, launch


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute the operator `swiglu`."""
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    grid = (ceil_div(out.numel(), ELEMENTS),)
    launch(_forward, grid, out, gate_up, out, out.numel(), BLOCK=ELEMENTS)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Compute the backward side of `swiglu`."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    result = gate_up.new_empty(gate_up.shape)
    grid = (ceil_div(grad.numel(), ELEMENTS),)
    launch(_backward, grid, grad, grad, gate_up, result, grad.numel(), BLOCK=ELEMENTS)
    return result


@triton.jit
def _forward(gate_up, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = 2 * place[:, None] + tl.arange(0, 2)[None, :]
    gate, up = tl.split(tl.load(gate_up + pair, mask=pair < 2 * size, other=0.0).to(tl.float32))
    tl.store(out + place, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=place < size)


@triton.jit
def _backward(grad, gate_up, result, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = 2 * place[:, None] + tl.arange(0, 2)[None, :]
    gate, up = tl.split(tl.load(gate_up + pair, mask=pair < 2 * size, other=0.0).to(tl.float32))
    upper = tl.load(grad + place, mask=place < size, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = upper * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    both = tl.join(grad_gate, upper * gate * sigmoid)
    tl.store(result + pair, both.to(result.dtype.element_ty), mask=pair < 2 * size)
