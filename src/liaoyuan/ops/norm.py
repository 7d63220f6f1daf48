"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4), alone and joined with the residual addition."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import ASCEND, NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, save_inputs, saved_inputs, wide
from liaoyuan.ops.shapes import takes_shapes


@takes_shapes(x="float [..., H]", weight="float [H]")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight` over the last dimension; computed in fp32, returned in x's dtype.

    Shapes: x [..., H], weight [H] -> [..., H].
    """
    if takes(RMS_NORM, x, weight):
        return RMS_NORM.call(x, weight, eps)
    return _rms_norm(x, weight, eps)


@takes_shapes(residual="float [N, H]", x="float [N, H]", weight="float [H]")
def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(residual + x, rms_norm(residual + x))`: [N, H], [N, H] -> ([N, H], [N, H])."""
    if takes(ADD_RMS_NORM, x, residual, weight):
        return ADD_RMS_NORM.call(residual, x, weight, eps)
    return _add_rms_norm(residual, x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = wide(x)
    scale = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (y * scale).to(x.dtype)


def _add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, _rms_norm(total, weight, eps)


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = pull_back(_rms_norm, (x, weight, eps), (0, 1), (grad,))
    return grad_x, grad_weight


def _add_rms_norm_backward(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _rms_norm_backward(grad, total, weight, eps)
    return (grad_x if grad_total is None else grad_x + grad_total), grad_weight


def _apply(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *torch.ops.liaoyuan.rms_norm_backward(grad, *saved_inputs(ctx)), None


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, (output[0], *inputs[2:]), output)


def _apply_add(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return grad_total, grad_total, None, None
    grad_in, grad_weight = torch.ops.liaoyuan.add_rms_norm_backward(grad_total, grad, *saved_inputs(ctx))
    return grad_in, grad_in, grad_weight, None


def _like(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_two(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x, weight, eps), _like(x, weight, eps)


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    for rows, width in ((3, 24), (130, 320)):
        x = torch.randn(rows, width, generator=generator).to(dtype)
        yield x, torch.rand(width, generator=generator).to(dtype) + 0.5, 1e-6


def _samples_add(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, weight, eps in _samples(dtype):
        yield x.flip(0).contiguous(), x, weight, eps


RMS_NORM = register(
    Operator(
        name="rms_norm",
        kernels=(NATIVE, ASCEND, triton("norm"), TILED),
        schema="(Tensor x, Tensor weight, float eps) -> Tensor",
        reference=_rms_norm,
        fake=_like,
        samples=_samples,
        flops=lambda x, weight, eps: 0,
        workload=lambda dtype: (torch.randn(2048, 1024, dtype=dtype), torch.ones(1024, dtype=dtype), 1e-6),
        traffic=lambda x, weight, eps: 2 * x.numel() * x.element_size(),
        gradient=Gradient(
            inputs=(0, 1),
            schema="(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
            reference=_rms_norm_backward,
            fake=lambda grad, x, weight, eps: (_like(x, weight, eps), torch.empty_like(weight)),
            save=save_inputs,
            apply=_apply,
        ),
    )
)

ADD_RMS_NORM = register(
    Operator(
        name="add_rms_norm",
        kernels=(NATIVE, ASCEND, triton("norm"), TILED),
        schema="(Tensor residual, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
        reference=_add_rms_norm,
        fake=_like_two,
        samples=_samples_add,
        flops=lambda residual, x, weight, eps: 0,
        workload=lambda dtype: (
            *(torch.randn(2048, 1024, dtype=dtype) for _ in range(2)),
            torch.ones(1024, dtype=dtype),
            1e-6,
        ),
        traffic=lambda residual, x, weight, eps: 4 * x.numel() * x.element_size(),
        gradient=Gradient(
            inputs=(0, 1, 2),
            schema="(Tensor? grad_total, Tensor grad, Tensor total, Tensor weight, float eps) -> (Tensor, Tensor)",
            reference=_add_rms_norm_backward,
            fake=lambda grad_total, grad, total, weight, eps: (_like(total, weight, eps), torch.empty_like(weight)),
            save=_save_total,
            apply=_apply_add,
        ),
    )
)
