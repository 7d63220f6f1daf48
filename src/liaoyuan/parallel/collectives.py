"""Collectives through which gradients flow, each the transpose of its backward pass.

Rows are the first dimension. In a tensor-parallel region every process of the group computes the same loss, so a sum
over the group is undone by handing each its gradient unchanged; where tokens are spread over the processes, gathering
rows is undone by adding up the gradients of all and keeping one's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from liaoyuan.ops import wide


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all processes one after another, [N, ...] -> [size * N, ...]; backward: `scatter_sum`."""
    out: Tensor = _GatherRows.apply(x, group)
    return out


def scatter_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add x up over the processes and return this one's rows, [size * N, ...] -> [N, ...]; backward: `gather_rows`."""
    out: Tensor = _ScatterSum.apply(x, group)
    return out


def ordered_scatter_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return what `scatter_sum` does, but whatever the backend, by `add_in_order`."""
    out: Tensor = _OrderedScatterSum.apply(x, group)
    return out


def add_in_order(parts: Tensor) -> Tensor:
    """Return the sum of parts [P, ...], added one after another in fp32 (fp64 for fp64) and rounded once."""
    total = wide(parts[0]).clone()
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def replicated_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all processes one after another, with which all go on alike: each takes the gradient of its
    own.
    """
    out: Tensor = _ReplicatedRows.apply(x, group)
    return out


def replicated_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add x up over the processes, which all go on with the sum alike; the gradient of the sum is that of each."""
    out: Tensor = _ReplicatedSum.apply(x, group)
    return out


def exchange_rows(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Send `sent[p]` rows, in order, to each process p and return those received, ordered by sender."""
    out: Tensor = _ExchangeRows.apply(x, list(sent), list(received), group)
    return out


class Exchange:
    """An exchange of rows under way, forward or backward: what it sends and what arrives."""

    def __init__(self, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> None:
        self.sent, self.received, self.group = list(sent), list(received), group
        self._work: Any = None
        self._leaving: Tensor | None = None
        self._arriving: Tensor | None = None

    def begin(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rows and return the tensor into which others come."""
        self._leaving = x.contiguous()
        arriving = self._arriving = x.new_empty(sum(received), *x.shape[1:])
        self._work = dist.all_to_all_single(arriving, self._leaving, received, sent, group=self.group, async_op=True)
        return arriving

    def end(self) -> Tensor:
        """Wait for it, and return what has arrived. It is let go of: the rows know the exchange, as part of autograd's
        graph, and would else be held until cycles are collected.
        """
        self._work.wait()
        arrived, self._arriving = self._arriving, None
        self._work = self._leaving = None
        assert arrived is not None
        return arrived


def start_exchange(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup
) -> tuple[Tensor, Exchange]:
    """Begin what `exchange_rows` does; the rows may be read after `finish_exchange`.

    In the backward pass the gradients set out where the rows arrived, and are waited for where they were sent, so that
    whatever lies between the two is computed meanwhile.
    """
    exchange = Exchange(sent, received, group)
    out: Tensor = _StartExchange.apply(x, exchange)
    return out, exchange


def finish_exchange(rows: Tensor, exchange: Exchange) -> Tensor:
    """Wait for the rows of `start_exchange` and return them."""
    out: Tensor = _FinishExchange.apply(rows, exchange)
    return out


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(x, exchange.sent, exchange.received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return ctx.exchange.end(), None  # not the gradient that came, which stands in for it


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.end()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.begin(grads[0], exchange.received, exchange.sent)
        return grads[0], None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.group), None


class _OrderedScatterSum(_ScatterSum):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, x.contiguous(), group=group)
        return add_in_order(parts.unflatten(0, (group.size(), -1)))


class _ReplicatedRows(_GatherRows):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].unflatten(0, (ctx.group.size(), -1))[ctx.group.rank()], None


class _ReplicatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_single(out, x.contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_single(out, x.contiguous(), group=group)
    return out


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
