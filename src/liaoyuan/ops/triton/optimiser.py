"""AdamW and sums of squares: element by element, each read and written once.

Rounding by chance needs no state: the random number of an element follows from a key and its place, in 32 bits that
wrap round, so an element has the same one wherever it is updated.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.triton.launch import ELEMENTS, ceil_div, launch, programs

# as int32, which is what Ascend's compiler multiplies; the numbers are those of `ops.optimiser`
STEP = tl.constexpr(0x9E3779B9 - 2**32)
FACTORS = (tl.constexpr(0x85EBCA6B - 2**32), tl.constexpr(0xC2B2AE35 - 2**32))
FIRST, SECOND = FACTORS


def adamw_step(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Sequence[float], key: int, offset: int
) -> None:
    """Compute the operator `adamw_step`."""
    size = weight.numel()
    given = [x if x.is_contiguous() else x.contiguous() for x in (weight, first, second)]
    numbers = (*rates, _signed(key), _signed(offset), size)
    by_chance = weight.dtype is torch.bfloat16
    grid = (programs(ceil_div(size, ELEMENTS)),)
    launch(
        _adamw, grid, weight, given[0], gradient.contiguous(), *given[1:], *numbers, CHANCE=by_chance, BLOCK=ELEMENTS
    )
    for own, updated in zip((weight, first, second), given, strict=True):
        if own is not updated:
            own.copy_(updated)


def square_sum(x: Tensor) -> Tensor:
    """Compute the operator `square_sum`: within 1024 elements in fp32, their sums in fp64."""
    x, parts = x.contiguous(), ceil_div(x.numel(), ELEMENTS)
    sums = x.new_empty(parts, dtype=torch.float32)
    launch(_squares, (programs(parts),), x, x, sums, x.numel(), parts, BLOCK=ELEMENTS)
    return sums.double().sum()


def _signed(number: int) -> int:
    """Return the low 32 bits of a number as int32."""
    return (number + 2**31) % 2**32 - 2**31


@triton.jit
def _shifted(x, BITS: tl.constexpr):
    """Return x >> BITS with zeros from above."""
    return (x >> BITS) & ((1 << (32 - BITS)) - 1)


@triton.jit
def _mixed(x):
    x = (x ^ _shifted(x, 16)) * FIRST
    x = (x ^ _shifted(x, 13)) * SECOND
    return x ^ _shifted(x, 16)


@triton.jit(do_not_specialize=("key", "offset", "size"))
def _adamw(
    weight, gradient, first, second, keep, rate, first_rate, second_keep, second_rate, scale, eps, key, offset, size,
    CHANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        slope = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(first + place, mask=inside, other=0.0)
        square = tl.load(second + place, mask=inside, other=0.0)
        mean += first_rate * (slope - mean)
        square = square * second_keep + second_rate * slope * slope
        tl.store(first + place, mean, mask=inside)
        tl.store(second + place, square, mask=inside)
        old = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        new = old * keep - mean / (tl.sqrt(square) * scale + eps) * rate
        if CHANCE:
            number = block * BLOCK + tl.arange(0, BLOCK) + offset
            bits = new.to(tl.int32, bitcast=True) + _shifted(_mixed(number * STEP + key), 16)
            rounded = (bits & -65536).to(tl.float32, bitcast=True)
            new = tl.where(new == new, rounded, new)
        tl.store(weight + place, new.to(weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("size", "parts"))
def _squares(x, sums, size, parts, BLOCK: tl.constexpr):
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        place = tl.cast(part, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
        tl.store(sums + part, tl.sum(value * value, 0))
