"""Gated activations: act(gate) * up, from one merged projection in which gate and up alternate.

SwiGLU and GEGLU: Shazeer 2020 (arXiv 2002.05202), sec. 2; GELU and its approximation by tanh: Hendrycks and Gimpel 2016
(arXiv 1606.08415), sec. 2. The clamped SwiGLU is gpt-oss's (arXiv 2508.10925, and its published code).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, save_inputs, saved_inputs
from liaoyuan.ops.shapes import ShapeError, takes_shapes


@takes_shapes(gate_up="float [..., _]")
def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: [N, 2 * I] -> [N, I]; gate and up alternate (gate 0, up 0, gate 1, ...).

    Raises:
        ShapeError: the last dimension is odd; so do the others here.
    """
    return _computed(SWIGLU, gate_up)


@takes_shapes(gate_up="float [..., _]")
def geglu(gate_up: Tensor, approximate: bool = False) -> Tensor:
    """Return gelu(gate) * up, as `swiglu` does; `approximate`: by tanh ("gelu_pytorch_tanh"), else by erf ("gelu")."""
    return _computed(GEGLU, gate_up, approximate)


@takes_shapes(gate_up="float [..., _]")
def clamped_swiglu(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    """Return (up + 1) * gate * sigmoid(alpha * gate), as `swiglu` does.

    The gate counts as `limit` at most, up as between -`limit` and `limit`; where it is beyond it has no gradient.
    """
    return _computed(CLAMPED_SWIGLU, gate_up, limit, alpha)


def _computed(operator: Operator, gate_up: Tensor, *settings: Any) -> Tensor:
    if gate_up.shape[-1] % 2:
        raise ShapeError(
            f"{operator.name}: gate_up {list(gate_up.shape)} is odd in its last dimension, which has pairs."
        )
    if gate_up.dim() == 2 and takes(operator, gate_up):
        return operator.call(gate_up, *settings)
    return operator.reference(gate_up, *settings)


def pairs(gate_up: Tensor) -> tuple[Tensor, ...]:
    """Return gate and up, which alternate in the last dimension."""
    return gate_up.unflatten(-1, (-1, 2)).unbind(-1)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = pairs(gate_up)
    return F.silu(gate) * up


def _geglu(gate_up: Tensor, approximate: bool) -> Tensor:
    gate, up = pairs(gate_up)
    return F.gelu(gate, approximate="tanh" if approximate else "none") * up


def _clamped_swiglu(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    gate, up = pairs(gate_up)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _operator(
    name: str, settings: str, reference: Callable[..., Tensor], samples: tuple[tuple[Any, ...], ...]
) -> Operator:
    """Return the operator of an activation, whose `settings` are numbers behind `gate_up`; `samples` of them."""

    def backward(grad: Tensor, *inputs: Any) -> Tensor:
        return pull_back(reference, inputs, (0,), (grad,))[0]

    def apply(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = getattr(torch.ops.liaoyuan, f"{name}_backward")(grad, *saved_inputs(ctx))
        return found, *(None for _ in samples[0])

    def draw(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(2)
        for setting in samples:
            for rows, width in ((3, 10), (70, 320), (0, 6)):
                yield (2 * torch.randn(rows, 2 * width, generator=generator)).to(dtype), *setting

    return Operator(
        name=name,
        kernels=(NATIVE, triton("gated"), TILED),
        schema=f"(Tensor gate_up{settings}) -> Tensor",
        reference=reference,
        fake=lambda gate_up, *_: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
        samples=draw,
        flops=lambda *_: 0,
        workload=lambda dtype: (torch.randn(2048, 4096, dtype=dtype), *samples[0]),
        traffic=lambda gate_up, *_: gate_up.numel() * gate_up.element_size() * 3 // 2,
        gradient=Gradient(
            inputs=(0,),
            schema=f"(Tensor grad, Tensor gate_up{settings}) -> Tensor",
            reference=backward,
            fake=lambda grad, gate_up, *_: torch.empty_like(gate_up, memory_format=torch.contiguous_format),
            save=save_inputs,
            apply=apply,
        ),
    )


SWIGLU = register(_operator("swiglu", "", _swiglu, ((),)))
GEGLU = register(_operator("geglu", ", bool approximate", _geglu, ((False,), (True,))))
CLAMPED_SWIGLU = register(
    _operator("clamped_swiglu", ", float limit, float alpha", _clamped_swiglu, ((7.0, 1.702), (1.0, 1.0)))
)
