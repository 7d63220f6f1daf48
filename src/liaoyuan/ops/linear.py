"""The linear layer, with a bias and a residual stream added before the one rounding; the bits of a row are its own.

PyTorch's product on CPUs gives other bits for the same row in another batch, since its library chooses the order of
summation by the number of rows; the kernels here have one order for all.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, Product, register, wide
from liaoyuan.ops.shapes import ShapeError, takes_shapes


@takes_shapes(x="float [..., K]", weight="same [O, K]", bias="same [O]", residual="same [..., O]")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias + residual, summed in fp32 and rounded once.

    Args:
        x: [..., K]; weight: [O, K]; bias: [O]; residual: [..., O], the stream that the layer adds to.

    Raises:
        ShapeError: the shapes or dtypes do not fit.
    """
    if residual is not None and residual.shape[:-1] != x.shape[:-1]:
        raise ShapeError(f"linear: residual {list(residual.shape)} has not the rows of x {list(x.shape)}.")
    if x.dim() == 2 and takes(LINEAR, x, weight, bias, residual):
        return LINEAR.call(x, weight, bias, residual)
    return _linear(x, weight, bias, residual)


def exact_rows() -> int:
    """Return up to how many rows the bits of a row of a product depend on it alone, on this machine's CPU.

    Any number, or none where there is no kernel and the product is PyTorch's own.
    """
    return sys.maxsize if takes(LINEAR, torch.empty(0)) else 0


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, product: Product = F.linear
) -> Tensor:
    if residual is None:
        return product(x, weight, bias)
    return (wide(product(x, weight, bias)) + wide(residual)).to(x.dtype)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return grad @ weight, grad.t() @ x, grad.sum(0) if with_bias else grad.new_empty(0)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(weight.shape[0] if with_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, *added = inputs
    ctx.save_for_backward(x, weight)
    ctx.added = [tensor is not None for tensor in added]


def _apply(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with_bias, with_residual = ctx.added
    if not ctx.needs_input_grad[1] and not ctx.needs_input_grad[2]:  # a frozen one, below adapters
        grad_x = torch.ops.liaoyuan.linear(grad, ctx.saved_tensors[1].t(), None, None)
        return grad_x, None, None, grad if with_residual else None
    grad_x, grad_weight, grad_bias = torch.ops.liaoyuan.linear_backward(grad, *ctx.saved_tensors, with_bias)
    return grad_x, grad_weight, grad_bias if with_bias else None, grad if with_residual else None


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(8)
    sizes = ((3, 24, 40, True, False), (70, 600, 96, False, True), (600, 64, 130, True, True))
    for rows, width, out, with_bias, with_residual in sizes:
        x, weight, bias, residual = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((rows, width), (out, width), (out,), (rows, out))
        )
        yield x, weight, bias if with_bias else None, residual if with_residual else None


def _traffic(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> int:
    results = len(x) * len(weight) * (1 if residual is None else 2)
    return (x.numel() + weight.numel() + results) * x.element_size()


LINEAR = register(
    Operator(
        name="linear",
        kernels=(NATIVE, triton("linear", fallback=True), TILED),  # vendors' products are a tenth faster on cards
        schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
        reference=_linear,
        fake=lambda x, weight, bias, residual: x.new_empty(x.shape[0], weight.shape[0]),
        samples=_samples,
        flops=lambda x, weight, bias, residual: 2 * x.numel() * weight.shape[0],
        workload=lambda dtype: (torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype), None, None),
        traffic=_traffic,
        gradient=Gradient(
            inputs=(0, 1, 2, 3),
            schema="(Tensor grad, Tensor x, Tensor weight, bool with_bias) -> (Tensor, Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=_save,
            apply=_apply,
            flops=lambda grad, x, weight, with_bias: 4 * x.numel() * weight.shape[0],
        ),
    )
)
