"""Projections of tensor parallelism that compute while their tokens travel, in chunks (Wang et al. 2023, ASPLOS,
"Overlap communication with dependent computation via decomposition").

`gather_linear` multiplies one chunk of all processes' tokens while the next one arrives; `linear_scatter` sends one
chunk's partial sums while it computes the next. Both do the same in their backward passes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from liaoyuan.ops import linear

CHUNKS = 4


def gather_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
    """Return `linear` of the rows of all processes: x [n, K], weight [O, K], bias [O] or None -> [size * n, O]."""
    out: Tensor = _GatherLinear.apply(x, weight, bias, group)
    return out


def linear_scatter(x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
    """Return this process's rows of the sum over all processes of `linear`: x [size * n, K] -> [n, O]."""
    out: Tensor = _LinearScatter.apply(x, weight, bias, group)
    return out


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
        everyone = x.new_empty(group.size(), *x.shape)
        out = x.new_empty(group.size(), x.shape[0], weight.shape[0])
        for rows, arrived in _gather(x, group):
            everyone[:, rows] = arrived
            out[:, rows] = linear(arrived.flatten(0, 1), weight, bias).unflatten(0, (group.size(), -1))
        ctx.save_for_backward(everyone, weight)
        ctx.group, ctx.biased = group, bias is not None
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        everyone, weight = ctx.saved_tensors
        grad_x, last = _scatter(grads[0], weight, ctx.group)
        grad_weight = grads[0].t() @ everyone.flatten(0, 1)  # while the last chunk travels
        last.wait()
        return grad_x, grad_weight, grads[0].sum(0) if ctx.biased else None, None


class _LinearScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.biased = group, bias is not None
        out, last = _scatter(x, weight.t(), group, bias)
        last.wait()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size, count = ctx.group.size(), grads[0].shape[0]
        everyone = grads[0].new_empty(size, *grads[0].shape)
        grad_x = x.new_empty(size, count, x.shape[1])
        for rows, arrived in _gather(grads[0], ctx.group):
            everyone[:, rows] = arrived
            grad_x[:, rows] = arrived @ weight
        whole = everyone.flatten(0, 1)
        return grad_x.flatten(0, 1), whole.t() @ x, whole.sum(0) if ctx.biased else None, None


def _gather(x: Tensor, group: ProcessGroup):  # type: ignore[no-untyped-def]
    """Yield rows of x and those of all processes, [size, rows, K], asking for the next before the last is used."""
    pieces = _pieces(x.shape[0])
    arriving = [_start_gather(x[pieces[0]], group)]
    for number, rows in enumerate(pieces):
        if number + 1 < len(pieces):
            arriving.append(_start_gather(x[pieces[number + 1]], group))
        everyone, work, _ = arriving[number]
        work.wait()
        arriving[number] = (everyone, None, None)
        yield rows, everyone


def _start_gather(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any, Any]:
    sent = x.contiguous()
    everyone = sent.new_empty(group.size(), *sent.shape)
    return everyone, dist.all_gather_single(everyone.flatten(0, 1), sent, group=group, async_op=True), sent


def _scatter(x: Tensor, right: Tensor, group: ProcessGroup, bias: Tensor | None = None) -> tuple[Tensor, Any]:
    """Return this process's rows of the sum of x @ right, of which the last may still be arriving, and its work."""
    size = group.size()
    parts = x.unflatten(0, (size, -1))
    out = x.new_empty(parts.shape[1], right.shape[1])
    works, sent = [], []
    for rows in _pieces(parts.shape[1]):
        product = parts[:, rows].flatten(0, 1) @ right
        sent.append(product if bias is None else product + bias)
        works.append(dist.reduce_scatter_single(out[rows], sent[-1], group=group, async_op=True))
    for work in works[:-1]:
        work.wait()
    return out, _Last(works[-1], sent)


class _Last:
    """A transfer under way, and what it sends."""

    def __init__(self, work: Any, sent: list[Tensor]) -> None:
        self._work, self._sent = work, sent

    def wait(self) -> None:
        self._work.wait()
        self._sent.clear()


def _pieces(rows: int) -> list[slice]:
    length = -(-rows // CHUNKS)
    return [slice(begin, min(begin + length, rows)) for begin in range(0, rows, length)]
