"""SwiGLU (Shazeer 2020, arXiv 2002.05202, sec. 2): silu(gate) * up, from one merged projection."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, save_inputs, saved_inputs
from liaoyuan.ops.shapes import ShapeError, takes_shapes


@takes_shapes(gate_up="float [..., _]")
def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: [N, 2 * I] -> [N, I]; gate and up alternate (gate 0, up 0, gate 1, ...)."""
    if gate_up.shape[-1] % 2:
        raise ShapeError(f"swiglu: gate_up {list(gate_up.shape)} has no column for each of its gates.")
    if gate_up.dim() == 2 and takes(SWIGLU, gate_up):
        return SWIGLU.call(gate_up)
    return _swiglu(gate_up)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return pull_back(_swiglu, (gate_up,), (0,), (grad,))[0]


def _apply(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.liaoyuan.swiglu_backward(grad, *saved_inputs(ctx))


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(2)
    for rows, width in ((3, 10), (70, 320)):
        yield (torch.randn(rows, 2 * width, generator=generator).to(dtype),)


SWIGLU = register(
    Operator(
        name="swiglu",
        kernels=(NATIVE, triton("swiglu")),
        schema="(Tensor gate_up) -> Tensor",
        reference=_swiglu,
        fake=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
        samples=_samples,
        flops=lambda gate_up: 0,
        workload=lambda dtype: (torch.randn(2048, 4096, dtype=dtype),),
        traffic=lambda gate_up: gate_up.numel() * gate_up.element_size() * 3 // 2,
        gradient=Gradient(
            inputs=(0,),
            schema="(Tensor grad, Tensor gate_up) -> Tensor",
            reference=_backward,
            fake=lambda grad, gate_up: torch.empty_like(gate_up, memory_format=torch.contiguous_format),
            save=save_inputs,
            apply=_apply,
        ),
    )
)
