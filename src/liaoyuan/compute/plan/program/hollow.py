"""Tensors without content, for programs that decide by whole numbers: floats are hollow, whole numbers are real.

A hollow tensor has a shape, a dtype and strides, and no memory (PyTorch's FakeTensor). What a program computes of real
whole numbers alone (document boundaries, positions, rows for each expert) is real, so that it can be read and decided
by. What depends on a hollow tensor is hollow, but for these: a hollow number that is read is 2, or 1 if it is a whole
one; what a router chose is divided equally among the experts; and an exchange of whole numbers brings what was sent.
What a mask of real truth values takes of a hollow tensor is as much as the mask has that is true.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from liaoyuan.ops.watch import name_of, tensors_in

READ, COUNTED = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.bincount.default
TAKE = torch.ops.aten.index.Tensor
READ_FLOAT, READ_WHOLE = 2.0, 1  # a norm of 2 is finite, and clipped
WHOLE = (torch.int32, torch.int64, torch.bool, torch.uint8)
RECEIVED = 1  # what a stage of a pipeline is sent: the vote that shapes are known


class Hollow(TorchDispatchMode):
    """While it is in force, tensors of floats that are made are hollow."""

    def __init__(self) -> None:
        super().__init__()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is its parts that are computed
        return self._compute(func, args, kwargs or {})

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = list(tensors_in((args, tuple(kwargs.values()))))
        hollow = any(isinstance(x, FakeTensor) for x in given)
        if func is READ and hollow:
            return READ_FLOAT if given[0].dtype.is_floating_point else READ_WHOLE
        if func is COUNTED and hollow:
            return _even(given[0].numel(), args[2] if len(args) > 2 else kwargs["minlength"])
        if given and not hollow and not any(x.is_floating_point() for x in given):
            return _real(func, args, kwargs, given)
        if func is TAKE and hollow:
            args = (args[0], [_places(index) for index in args[1]], *args[2:])
        with self._mode:
            out = func(*args, **kwargs)
        if not given and isinstance(out, Tensor) and out.dtype in WHOLE:
            return func(*args, **kwargs)
        if name_of(func) == "permute_rows":
            rows, order, sizes = out
            return rows, order, _even(len(rows), len(sizes))
        return out


def _real(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: list[Tensor]) -> Any:
    """Compute whole numbers, and let those arrive that no other process sends."""
    if func.namespace == "c10d":
        name = func.overloadpacket.__name__
        if name in ("alltoall_base_", "_allgather_base_"):
            into, sent = args[:2]
            into.view(-1, *sent.shape).copy_(sent)
        elif name == "recv_":
            for x in given:
                x.fill_(RECEIVED)
    return func(*args, **kwargs)


def _places(index: Tensor | None) -> Tensor | None:
    """Return the places of a mask of one dimension that is known, int64; other indices as they are."""
    if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool or index.dim() != 1:
        return index
    return index.nonzero()[:, 0]


def _even(rows: int, parts: int) -> Tensor:
    """Return how many rows each part gets, int64 [parts], if they differ by one at most."""
    whole, rest = divmod(rows, parts)
    return torch.tensor([whole + (number < rest) for number in range(parts)])
