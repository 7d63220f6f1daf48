"""The linear layers of a mixture of experts: rows sorted by expert, each group with a matrix of its own.

Gale et al. 2022 (arXiv 2211.15841, sec. 3): groups may have any number of rows, and none are dropped or padded.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import ASCEND, NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, Product, pull_back, register, save_inputs, saved_inputs
from liaoyuan.ops.shapes import takes_shapes


@takes_shapes(x="float [N, K]", weight="same [E, O, K]", sizes="int32/int64 [E]", bias="same [E, O]")
def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return each expert's rows times its weight: [N, O].

    Args:
        x: [N, K], the rows of expert 0, then those of expert 1, ...
        weight: [E, O, K]; bias: [E, O] or None.
        sizes: int32 or int64 [E], the number of rows of each expert; their sum is N.

    Raises:
        ValueError: shapes do not fit. RuntimeError: the sizes do not add up to N.
    """
    if takes(GROUPED_LINEAR, x, weight, bias):
        return GROUPED_LINEAR.call(x, weight, sizes, bias)
    return _grouped_linear(x, weight, sizes, bias)


def _grouped_linear(
    x: Tensor, weight: Tensor, sizes: Tensor, bias: Tensor | None, product: Product = F.linear
) -> Tensor:
    # Unbound, not indexed one by one: the gradient of each index would be a tensor as large as all experts.
    biases = [None] * len(weight) if bias is None else bias.unbind()
    groups = zip(x.split(sizes.tolist()), weight.unbind(), biases, strict=True)
    used = [product(*group) for group in groups if len(group[0])]
    return torch.cat(used) if used else product(x, weight[0], biases[0])  # no rows: still part of the graph


def _backward(grad: Tensor, x: Tensor, weight: Tensor, sizes: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = pull_back(_grouped_linear, (x, weight, sizes, None), (0, 1), (grad,))
    if not with_bias:
        return grad_x, grad_weight, grad.new_empty(0, weight.shape[1])
    sums = [rows.sum(0) for rows in grad.split(sizes.tolist())]
    return grad_x, grad_weight, torch.stack(sums)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    experts, out, _ = weight.shape
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(experts if with_bias else 0, out)


def _apply(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
    x, weight, sizes, bias = saved_inputs(ctx)
    if not ctx.needs_input_grad[1] and not ctx.needs_input_grad[3]:  # frozen ones, below adapters
        return torch.ops.liaoyuan.grouped_linear(grad, weight.mT, sizes, None), None, None, None
    found = torch.ops.liaoyuan.grouped_linear_backward(grad, x, weight, sizes, bias is not None)
    return found[0], found[1], None, None if bias is None else found[2]


def _sample(
    sizes: Sequence[int], out: int, width: int, with_bias: bool, dtype: torch.dtype, seed: int = 12
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((sum(sizes), width), (len(sizes), out, width), (len(sizes), out))
    )
    return x, weight, torch.tensor(sizes), bias if with_bias else None


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    yield _sample((1, 0, 4, 9), 40, 24, True, dtype)
    yield _sample((0, 70, 2), 96, 200, False, dtype)
    yield _sample((3, 31), 21, 37, True, dtype)


GROUPED_LINEAR = register(
    Operator(
        name="grouped_linear",
        kernels=(NATIVE, ASCEND, triton("grouped_linear"), TILED),
        schema="(Tensor x, Tensor weight, Tensor sizes, Tensor? bias) -> Tensor",
        reference=_grouped_linear,
        fake=lambda x, weight, sizes, bias: x.new_empty(x.shape[0], weight.shape[1]),
        samples=_samples,
        flops=lambda x, weight, sizes, bias: 2 * x.numel() * weight.shape[1],
        workload=lambda dtype: _sample([16] * 32, 1024, 512, False, dtype),
        traffic=lambda x, weight, sizes, bias: (
            (x.numel() + weight.numel() + len(x) * weight.shape[1]) * x.element_size()
        ),
        gradient=Gradient(
            inputs=(0, 1, 3),
            schema="(Tensor grad, Tensor x, Tensor weight, Tensor sizes, bool with_bias) -> (Tensor, Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=save_inputs,
            apply=_apply,
            flops=lambda grad, x, weight, sizes, with_bias: 4 * x.numel() * weight.shape[1],
        ),
    )
)
