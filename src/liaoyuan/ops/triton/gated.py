"""Gated activations: gate and up lie side by side, so a program reads pairs and takes them apart."""

import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ELEMENTS, ceil_div, launch


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute the operator `swiglu`."""
    return _gated(gate_up, "silu")


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Compute the backward side of `swiglu`."""
    return _gated_backward(grad, gate_up, "silu")


def geglu(gate_up: Tensor, approximate: bool) -> Tensor:
    """Compute the operator `geglu`."""
    return _gated(gate_up, "gelu_tanh" if approximate else "gelu")


def geglu_backward(grad: Tensor, gate_up: Tensor, approximate: bool) -> Tensor:
    """Compute the backward side of `geglu`."""
    return _gated_backward(grad, gate_up, "gelu_tanh" if approximate else "gelu")


def clamped_swiglu(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    """Compute the operator `clamped_swiglu`."""
    return _gated(gate_up, "clamped", limit, alpha)


def clamped_swiglu_backward(grad: Tensor, gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    """Compute the backward side of `clamped_swiglu`."""
    return _gated_backward(grad, gate_up, "clamped", limit, alpha)


def _gated(gate_up: Tensor, kind: str, limit: float = 0.0, alpha: float = 1.0) -> Tensor:
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    grid = (ceil_div(out.numel(), ELEMENTS),)
    launch(_forward, grid, out, gate_up, out, out.numel(), limit, alpha, KIND=kind, BLOCK=ELEMENTS)
    return out


def _gated_backward(grad: Tensor, gate_up: Tensor, kind: str, limit: float = 0.0, alpha: float = 1.0) -> Tensor:
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    result = gate_up.new_empty(gate_up.shape)
    grid = (ceil_div(grad.numel(), ELEMENTS),)
    launch(_backward, grid, grad, grad, gate_up, result, grad.numel(), limit, alpha, KIND=kind, BLOCK=ELEMENTS)
    return result


@triton.jit
def _share(gate, alpha, KIND: tl.constexpr):
    """Return the share of the gate that its activation lets through."""
    if KIND == "gelu":
        return 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    if KIND == "gelu_tanh":
        return tl.sigmoid(gate * (1.5957691216057308 + 0.07135481627159768 * gate * gate))
    return tl.sigmoid(alpha * gate)


@triton.jit
def _slope(gate, share, alpha, KIND: tl.constexpr):
    """Return the derivative of gate * share."""
    if KIND == "gelu":
        return share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    if KIND == "gelu_tanh":
        return share + gate * share * (1.0 - share) * (1.5957691216057308 + 0.21406444881479304 * gate * gate)
    return share * (1.0 + alpha * gate * (1.0 - share))


@triton.jit
def _forward(gate_up, out, size, limit, alpha, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = 2 * place[:, None] + tl.arange(0, 2)[None, :]
    gate, up = tl.split(tl.load(gate_up + pair, mask=pair < 2 * size, other=0.0).to(tl.float32))
    if KIND == "clamped":
        gate = tl.where(gate > limit, limit, gate)
        up = 1.0 + tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    tl.store(out + place, (gate * _share(gate, alpha, KIND) * up).to(out.dtype.element_ty), mask=place < size)


@triton.jit
def _backward(grad, gate_up, result, size, limit, alpha, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = 2 * place[:, None] + tl.arange(0, 2)[None, :]
    gate, up = tl.split(tl.load(gate_up + pair, mask=pair < 2 * size, other=0.0).to(tl.float32))
    upper = tl.load(grad + place, mask=place < size, other=0.0).to(tl.float32)
    of_gate, of_up = upper, upper
    if KIND == "clamped":
        of_gate = tl.where(gate > limit, 0.0, upper)
        of_up = tl.where((up > limit) | (up < -limit), 0.0, upper)
        gate = tl.where(gate > limit, limit, gate)
        up = 1.0 + tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    share = _share(gate, alpha, KIND)
    both = tl.join(of_gate * up * _slope(gate, share, alpha, KIND), of_up * gate * share)
    tl.store(result + pair, both.to(result.dtype.element_ty), mask=pair < 2 * size)
