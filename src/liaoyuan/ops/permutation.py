"""The way of rows to their experts and back: sorted by expert, and each token's results added up with their weights.

The gather and scatter of a dropless mixture of experts (Gale et al. 2022, arXiv 2211.15841, sec. 5.2). Each token adds
up its own results in the order of its choice, so a row's bits depend on no other row.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import ASCEND, NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, save_inputs, saved_inputs, wide
from liaoyuan.ops.shapes import ShapeError, takes_shapes


@takes_shapes(x="float [N, H]", chosen="int64 [N, K]")
def permute_rows(x: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token's row for each expert that it chose, and sort the copies by expert.

    Args:
        x: [N, H]. chosen: int64 [N, K], experts in 0 ... count - 1.

    Returns:
        rows: [N * K, H], those of one expert in the order of the tokens.
        order: int64 [N * K]; row p is that of choice `order[p] % K` of token `order[p] // K`.
        sizes: int64 [count], the number of rows of each expert.

    Raises:
        ValueError: shapes do not fit. RuntimeError: an expert that does not exist was chosen.
    """
    if takes(PERMUTE_ROWS, x):
        return PERMUTE_ROWS.call(x, chosen, count)
    return _permute_rows(x, chosen, count)


@takes_shapes(rows="float [N*K, H]", order="int64 [N*K]", weights="float [N, K]")
def combine_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Return each token's weighted sum of its rows: the way back of `permute_rows`.

    Args:
        rows: [N * K, H]. order: int64 [N * K], as `permute_rows` returns it. weights: [N, K], of any dtype.

    Returns:
        [N, H] in the dtype of the rows; summed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: shapes do not fit. RuntimeError: the order is no permutation.
    """
    if len(rows) != weights.numel():
        raise ShapeError(
            f"combine_rows: rows {list(rows.shape)} are not one for each of the weights {list(weights.shape)}."
        )
    if takes(COMBINE_ROWS, rows):
        return COMBINE_ROWS.call(rows, order, weights.float())
    return _combine_rows(rows, order, weights)


def _permute_rows(x: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    order = chosen.flatten().argsort(stable=True)
    sizes = torch.bincount(chosen.flatten(), minlength=count)
    if len(sizes) > count:
        raise RuntimeError(f"chosen names expert {len(sizes) - 1}, and there are {count}")
    return x.repeat_interleave(chosen.shape[1], 0)[order], order, sizes


def _combine_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    weighted = _by_token(rows, order, weights.shape[1]) * wide(weights)[..., None]
    return functools.reduce(torch.add, weighted.unbind(1)).to(rows.dtype)


def _by_token(rows: Tensor, order: Tensor, per_token: int) -> Tensor:
    """[N * K, H] -> [N, K, H]."""
    return wide(rows)[order.argsort()].view(len(rows) // per_token, per_token, rows.shape[1])


def _permute_backward(grad: Tensor, order: Tensor, per_token: int) -> Tensor:
    return _by_token(grad, order, per_token).sum(1).to(grad.dtype)


def _combine_backward(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    grad_rows, grad_weights = pull_back(_combine_rows, (rows, order, weights), (0, 2), (grad,))
    return grad_rows, grad_weights


def _save_order(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])
    ctx.per_token = inputs[1].shape[1]


def _apply_permute(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    return torch.ops.liaoyuan.permute_rows_backward(grad, *ctx.saved_tensors, ctx.per_token), None, None


def _apply_combine(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    grad_rows, grad_weights = torch.ops.liaoyuan.combine_rows_backward(grad, *saved_inputs(ctx))
    return grad_rows, None, grad_weights


def _chosen(tokens: int, per_token: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(tokens, count, generator=generator).topk(per_token, -1).indices


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(14)
    for tokens, per_token, count, width in ((3, 2, 4, 20), (40, 3, 7, 48)):
        yield (
            torch.randn(tokens, width, generator=generator).to(dtype),
            _chosen(tokens, per_token, count, generator),
            count,
        )


def _samples_back(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(15)
    for tokens, per_token, width in ((3, 2, 20), (40, 3, 48)):
        rows = torch.randn(tokens * per_token, width, generator=generator).to(dtype)
        order = torch.randperm(tokens * per_token, generator=generator)
        yield rows, order, torch.rand(tokens, per_token, generator=generator)


def _workload_back(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(8192, 1024, dtype=dtype), torch.randperm(8192), torch.rand(1024, 8)


def _bytes(x: Tensor, rows: int) -> int:
    """Bytes of so many rows like those of x."""
    return rows * x.shape[1] * x.element_size()


PERMUTE_ROWS = register(
    Operator(
        name="permute_rows",
        kernels=(NATIVE, ASCEND, triton("permutation"), TILED),
        schema="(Tensor x, Tensor chosen, int count) -> (Tensor, Tensor, Tensor)",
        reference=_permute_rows,
        fake=lambda x, chosen, count: (
            x.new_empty(chosen.numel(), x.shape[1]),
            chosen.new_empty(chosen.numel()),
            chosen.new_empty(count),
        ),
        samples=_samples,
        flops=lambda *_: 0,
        workload=lambda dtype: (torch.randn(1024, 1024, dtype=dtype), _chosen(1024, 8, 64), 64),
        traffic=lambda x, chosen, count: _bytes(x, len(x) + chosen.numel()),
        gradient=Gradient(
            inputs=(0,),
            schema="(Tensor grad, Tensor order, int per_token) -> Tensor",
            reference=_permute_backward,
            fake=lambda grad, order, per_token: grad.new_empty(grad.shape[0] // per_token, grad.shape[1]),
            save=_save_order,
            apply=_apply_permute,
        ),
    )
)

COMBINE_ROWS = register(
    Operator(
        name="combine_rows",
        kernels=(NATIVE, triton("permutation"), TILED),
        schema="(Tensor rows, Tensor order, Tensor weights) -> Tensor",
        reference=_combine_rows,
        fake=lambda rows, order, weights: rows.new_empty(weights.shape[0], rows.shape[1]),
        samples=_samples_back,
        flops=lambda *_: 0,
        workload=_workload_back,
        traffic=lambda rows, order, weights: _bytes(rows, len(rows) + len(weights)),
        gradient=Gradient(
            inputs=(0, 2),
            schema="(Tensor grad, Tensor rows, Tensor order, Tensor weights) -> (Tensor, Tensor)",
            reference=_combine_backward,
            fake=lambda grad, rows, order, weights: (rows.new_empty(rows.shape), weights.new_empty(weights.shape)),
            save=save_inputs,
            apply=_apply_combine,
        ),
    )
)
