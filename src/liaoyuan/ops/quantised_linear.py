"""The linear layer with weights of 8 or 4 bits: fewer bytes to read for every token, fewer to hold beside adapters.

Weights alone are quantised, activations stay as they are (round to nearest with a scale per output or per group of
the depth, as in Dettmers et al. 2022, arXiv 2208.07339, sec. 2.1, and Frantar et al. 2022, arXiv 2210.17323, sec. 4;
fp8 is e4m3 of Micikevicius et al. 2022, arXiv 2209.05433).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import ASCEND, NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, Product, register, save_inputs, saved_inputs, wide
from liaoyuan.ops.shapes import ShapeError, takes_shapes

Kind = Literal["int8", "int4", "fp8"]
GROUPS = {"int8": (None, 32, 64, 128), "int4": (32, 64, 128), "fp8": (None,)}
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # of a quantised weight, in steps
ZERO = 8  # of int4 without zeros
BLOCK = 128  # weights of int4 that are packed together
WIDENED_ROWS = 256  # outputs whose weights are fp32 at once in a backward pass


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight [O, K] of few bits.

    data: int8 [O, K]; fp8: its bits, uint8 [O, K]; int4: uint8 [O, B * 64] for B blocks of 128 along K, the last
        filled up; halfword i of a block has the weights i, 32 + i, 64 + i and 96 + i, the first in the lowest bits.
    scales: bf16 [O, G], one for each group along K (the last may be shorter); [O, 1] if group is None.
    zeros: uint8 [O, G] of int4, what stands for 0; None: 8.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    kind: Kind
    group: int | None
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales, self.zeros) if part is not None)


def quantise(weight: Tensor, kind: Kind, group: int | None = None, symmetric: bool = True) -> QuantisedWeight:
    """Return `weight` [O, K] with few bits; an int8 or int4 weight is off by at most half a step, its group's scale.

    Args:
        kind: "int8"; "int4"; "fp8": e4m3, off by at most 1/16 of the weight (below 1/64 of the scale, half of 1/512).
        group: weights along K that share a scale: 32, 64 or 128; None, for int8 and fp8: a whole output.
        symmetric: False, for int4 alone: every group has a zero point too, which suits weights of one sign.

    Raises:
        LiaoyuanError: the weight is not a finite matrix, or the kind has no such groups.
    """
    _check(weight, kind, group, symmetric)
    wide_weight = weight.detach().float()
    depth = weight.shape[1]
    size = group or max(depth, 1)
    grouped = F.pad(wide_weight, (0, -depth % size)).unflatten(1, (-1, size))
    zeros = None
    if symmetric:
        scales = _rounded_up(grouped.abs().amax(-1) / LARGEST[kind])
    else:
        low, high = grouped.amin(-1).clamp_max(0.0), grouped.amax(-1).clamp_min(0.0)
        scales = _rounded_up((high - low) / 15.0)
        zeros = (-low / scales).round_().clamp_(0, 15)
    steps = (grouped / scales[..., None]).flatten(1)[:, :depth]
    if kind == "fp8":
        data = steps.to(torch.float8_e4m3fn).view(torch.uint8)
    elif kind == "int8":
        data = steps.round_().to(torch.int8)
    else:
        shift = torch.full_like(scales, ZERO) if zeros is None else zeros
        raised = steps.round_() + shift.repeat_interleave(size, 1)[:, :depth]
        data = pack_nibbles(raised.clamp_(0, 15).to(torch.uint8))
    whole = (weight.shape[0], depth)
    zero_points = None if zeros is None else zeros.to(torch.uint8)
    return QuantisedWeight(data, scales.to(torch.bfloat16), zero_points, kind, group, whole)


def dequantise(weight: QuantisedWeight) -> Tensor:
    """Return the weight that `weight` stands for, fp32 [O, K]."""
    return _dequantise(weight.data, weight.scales, weight.zeros, weight.kind, weight.group or 0, weight.shape[1])


@takes_shapes(x="float [..., K]", bias="float [O]")
def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ dequantise(weight)^T + bias: x [..., K], bias [O] or None -> [..., O], of x's dtype.

    Sums are fp32. On CPUs a row's bits depend on that row alone, whatever the number of rows.

    Raises:
        LiaoyuanError: x or bias do not fit the weight.
    """
    out, depth = weight.shape
    if x.shape[-1:] != (depth,) or (bias is not None and bias.shape != (out,)):
        given = f"x {list(x.shape)}" + (f" and bias {list(bias.shape)}" if bias is not None else "")
        raise ShapeError(f"{given} do not fit a quantised weight [{out}, {depth}]: x needs {depth} columns.")
    rows = x.reshape(-1, depth) if x.dim() != 2 else x
    function = QUANTISED_LINEAR.call if takes(QUANTISED_LINEAR, x, bias) else _quantised_linear
    result = function(rows, weight.data, weight.scales, weight.zeros, bias, weight.kind, weight.group or 0)
    return result.reshape(*x.shape[:-1], out) if x.dim() != 2 else result


def _quantised_linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: str,
    group: int,
    product: Product = F.linear,
) -> Tensor:
    weight = _dequantise(data, scales, zeros, kind, group, x.shape[1])
    y = wide(x)
    return product(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype)).to(x.dtype)


def _backward(
    grad: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, with_bias: bool, kind: str, group: int, depth: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias. A weight of few bits has none: they flow through it to adapters (Dettmers et
    al. 2023, arXiv 2305.14314, sec. 3).
    """
    # In the gradient's own dtype, and widened some rows at a time: the few bits are there to save memory.
    weight = grad.new_empty(len(data), depth)
    for first in range(0, len(data), WIDENED_ROWS):
        rows = slice(first, first + WIDENED_ROWS)
        few = (data[rows], scales[rows], None if zeros is None else zeros[rows])
        weight[rows] = _dequantise(*few, kind, group, depth)
    return grad @ weight, grad.sum(0) if with_bias else grad.new_empty(0)


def _apply(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, data, scales, zeros, bias, kind, group = saved_inputs(ctx)
    backward = torch.ops.liaoyuan.quantised_linear_backward
    grad_x, grad_bias = backward(grad, data, scales, zeros, bias is not None, kind, group, x.shape[1])
    return grad_x, None, None, None, None if bias is None else grad_bias, None, None


def _dequantise(data: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, group: int, depth: int) -> Tensor:
    size = group or max(depth, 1)
    if kind == "fp8":
        steps = data.view(torch.float8_e4m3fn).float()
    elif kind == "int8":
        steps = data.float()
    else:
        zero = ZERO if zeros is None else zeros.float().repeat_interleave(size, 1)[:, :depth]
        steps = unpack_nibbles(data)[:, :depth].float() - zero
    return steps * scales.float().repeat_interleave(size, 1)[:, :depth]


def pack_nibbles(weights: Tensor) -> Tensor:
    """Return numbers of 4 bits, uint8 [O, K], as the `data` of a weight of kind int4."""
    planes = F.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, 4, 32))
    pairs = planes[:, :, 0::2] | planes[:, :, 1::2] << 4  # the bytes of every halfword
    return pairs.mT.flatten(1).contiguous()


def unpack_nibbles(data: Tensor) -> Tensor:
    """Return the numbers of 4 bits in `data`, uint8 [O, 128 * blocks]."""
    pairs = data.unflatten(1, (-1, 32, 2)).mT
    return torch.stack((pairs & 15, pairs >> 4), 3).flatten(1)


def _rounded_up(scales: Tensor) -> Tensor:
    """Return positive fp32 numbers that bf16 has too, not below `scales`."""
    bits = scales.clamp_min(torch.finfo(torch.bfloat16).tiny).view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def _check(weight: Tensor, kind: str, group: int | None, symmetric: bool) -> None:
    if kind not in GROUPS:
        raise LiaoyuanError(f"There are no quantised weights of kind '{kind}'. There are: {', '.join(GROUPS)}.")
    if group not in GROUPS[kind]:
        known = " or ".join(str(size) for size in GROUPS[kind])
        raise LiaoyuanError(f"A weight of kind {kind} has groups of {known} along its depth, not {group}.")
    if not symmetric and kind != "int4":
        raise LiaoyuanError(f"Only int4 has zero points; a weight of kind {kind} is symmetric.")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise LiaoyuanError(f"A weight [O, K] is quantised, not {list(weight.shape)} of {str(weight.dtype)[6:]}.")
    broken = int((~weight.isfinite()).sum())
    if broken:
        raise LiaoyuanError(f"The weight {list(weight.shape)} has {broken} elements that are infinite or not a number.")


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(12)
    for kind, group, symmetric in (
        ("int8", None, True), ("int8", 32, True), ("fp8", None, True), ("int4", 32, True), ("int4", 64, False),
        ("int4", 128, False),
    ):  # fmt: skip
        for rows, depth, out in ((1, 256, 7), (7, 1224, 34)):
            weight = quantise(torch.randn(out, depth, generator=generator) + 0.3, kind, group, symmetric)  # type: ignore[arg-type]
            x, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, depth), (out,)))
            yield x, weight.data, weight.scales, weight.zeros, bias, kind, group or 0


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    weight = quantise(torch.randn(4096, 4096), "int8")
    return torch.randn(1, 4096).to(dtype), weight.data, weight.scales, None, None, "int8", 0


def _traffic(x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, *_: Any) -> int:
    outputs = x.shape[0] * data.shape[0] * x.element_size()
    return sum(part.nbytes for part in (x, data, scales, zeros) if part is not None) + outputs


QUANTISED_LINEAR = register(
    Operator(
        name="quantised_linear",
        kernels=(NATIVE, triton("quantised_linear"), replace(ASCEND, dtypes=(torch.bfloat16,)), TILED),
        schema="(Tensor x, Tensor data, Tensor scales, Tensor? zeros, Tensor? bias, str kind, int group) -> Tensor",
        reference=_quantised_linear,
        fake=lambda x, data, *_: x.new_empty(x.shape[0], data.shape[0]),
        samples=_samples,
        flops=lambda x, data, *_: 2 * x.numel() * data.shape[0],
        workload=_workload,
        traffic=_traffic,
        gradient=Gradient(
            inputs=(0, 4),
            schema="(Tensor grad, Tensor data, Tensor scales, Tensor? zeros, bool with_bias, str kind, int group, "
            "int depth) -> (Tensor, Tensor)",
            reference=_backward,
            fake=lambda grad, data, scales, zeros, with_bias, kind, group, depth: (
                grad.new_empty(grad.shape[0], depth),
                grad.new_empty(grad.shape[1] if with_bias else 0),
            ),
            save=save_inputs,
            apply=_apply,
            flops=lambda grad, data, scales, zeros, with_bias, kind, group, depth: 2 * grad.numel() * depth,
        ),
    )
)
