"""What a call of an operator must cost at least: FLOPs of its matrix products, and bytes read and written.

An operator of this package has formulas of its own; PyTorch's FLOPs come from `torch.utils.flop_counter`, and the bytes
of all else are those of the tensors that go in and come out.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.watch import Call, tensors_in

OWN = "liaoyuan"
GROUPS = {  # of PyTorch's operators, by name; others are told by their tags
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "dot", "mv", "_grouped_mm"),
    "copies": (
        "_to_copy",
        "copy_",
        "clone",
        "cat",
        "stack",
        "repeat",
        "constant_pad_nd",
        "_unsafe_view",
        "_local_scalar_dense",
    ),
    "fills": ("zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "arange", "fill_", "zero_", "new_zeros"),
    "reductions": ("sum", "mean", "amax", "max", "min", "logsumexp", "_softmax", "_log_softmax", "linalg_vector_norm"),
    "indexing": (
        *(
            "embedding",
            "embedding_dense_backward",
            "gather",
            "scatter",
            "scatter_add",
            "index",
            "index_add",
            "index_put",
        ),
        *("index_select", "sort", "argsort", "topk", "bincount", "index_put_", "index_add_", "searchsorted", "cumsum"),
    ),
}


@dataclass(frozen=True)
class Cost:
    """Of one call. dtype: of the largest tensor of floats that it reads or writes; of matrix products, of the narrowest
    floats that it reads, since sums and statistics beside them are wider.
    """

    flops: int
    traffic: int
    dtype: torch.dtype


def cost_of(call: Call, output: Any) -> Cost:
    """Return what this call had to compute and move."""
    tensors = [*tensors_in(call.inputs), *tensors_in(tuple(call.named_inputs.values())), *tensors_in(output)]
    largest = max((x for x in tensors if x.is_floating_point()), key=Tensor.numel, default=None)
    dtype, flops = torch.float32 if largest is None else largest.dtype, _flops(call, output)
    if flops:
        read = [x.dtype for x in tensors_in(call.inputs) if x.is_floating_point() and x.dim() > 1]
        dtype = min(read, key=lambda one: one.itemsize, default=dtype)
    return Cost(flops, _traffic(call, tensors), dtype)


@functools.cache
def group_of(operator: str, function: Any) -> str:
    """Return the group of a table in which a call counts: "liaoyuan", or the kind of an operator of PyTorch's."""
    if not operator.startswith("aten."):
        return OWN if operator.removesuffix("_backward") in OPERATORS else "others"
    name = operator.removeprefix("aten.")
    if function.is_view or name.startswith(("detach", "empty", "new_empty")):
        return "views"
    if name.startswith(("_foreach_", "_fused_")):
        return "optimiser"
    known = next((group for group, names in GROUPS.items() if name in names), None)
    if known:
        return known
    return "element-wise" if torch.Tag.pointwise in function.tags else "others"


def _flops(call: Call, output: Any) -> int:
    formula = flop_registry.get(getattr(call.function, "overloadpacket", None))
    return int(formula(*call.inputs, **call.named_inputs, out_val=output)) if formula else 0


def _traffic(call: Call, tensors: list[Tensor]) -> int:
    operator = OPERATORS.get(call.operator)
    if operator and not call.named_inputs:
        return int(operator.traffic(*call.inputs))
    if getattr(call.function, "is_view", False) or call.operator.startswith("aten.empty"):
        return 0
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in {id(x): x for x in tensors}.values())
