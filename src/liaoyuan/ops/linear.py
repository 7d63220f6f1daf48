"""The linear layer, whose backward pass computes the weight's gradient faster than PyTorch's does on CPUs in bf16."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE_INEXACT
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, save_inputs, saved_inputs
from liaoyuan.ops.shapes import takes_shapes


@takes_shapes(x="float [..., K]", weight="same [O, K]", bias="same [O]")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias: x [N, K], weight [O, K], bias [O] or None -> [N, O]."""
    if x.dim() == 2 and takes(LINEAR, x, weight, bias):
        return LINEAR.call(x, weight, bias)
    return F.linear(x, weight, bias)


def exact_rows() -> int:
    """Return up to how many rows the bits of a row of a bf16 product depend on it alone, on this machine's CPU.

    All of them where AVX-512 multiplies bf16, 64 with AMX units, none else.
    """
    return (
        int(torch.ops.liaoyuan_native.exact_linear_rows()) if takes(LINEAR, torch.empty(0, dtype=torch.bfloat16)) else 0
    )


def _backward(grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = pull_back(F.linear, (x, weight), (0, 1), (grad,))
    return grad_x, grad_weight, grad.sum(0) if with_bias else grad.new_empty(0)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(weight.shape[0] if with_bias else 0)


def _apply(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, bias = saved_inputs(ctx)
    grad_x, grad_weight, grad_bias = torch.ops.liaoyuan.linear_backward(grad, x, weight, bias is not None)
    return grad_x, grad_weight, None if bias is None else grad_bias


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(8)
    for rows, width, out, with_bias in ((3, 24, 40, True), (70, 600, 96, False), (600, 64, 130, True)):
        x, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, out))
        yield x, weight, torch.randn(out, generator=generator).to(dtype) if with_bias else None


LINEAR = register(
    Operator(
        name="linear",
        kernels=(NATIVE_INEXACT,),  # for many rows torch's own product, whose bits depend on their number
        schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        reference=F.linear,
        fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
        samples=_samples,
        flops=lambda x, weight, bias: 2 * x.numel() * weight.shape[0],
        workload=lambda dtype: (torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype), None),
        traffic=lambda x, weight, bias: (x.numel() + weight.numel() + len(x) * len(weight)) * x.element_size(),
        gradient=Gradient(
            inputs=(0, 1, 2),
            schema="(Tensor grad, Tensor x, Tensor weight, bool with_bias) -> (Tensor, Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=save_inputs,
            apply=_apply,
            flops=lambda grad, x, weight, with_bias: 4 * x.numel() * weight.shape[0],
        ),
    )
)
