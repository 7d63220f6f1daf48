"""An optimiser's work on whole lists of tensors: AdamW, the global norm and clipping, Muon's orthogonalisation.

AdamW is that of Loshchilov and Hutter 2019 (arXiv 1711.05101, alg. 2). A bf16 weight is rounded up or down by chance
(Gupta et al. 2015, arXiv 1502.02551, sec. 3): right on the mean, so that updates far below its last place count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from liaoyuan.device import Device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, triton
from liaoyuan.ops.operator import KERNEL_DTYPES, Operator, register, wide
from liaoyuan.ops.shapes import ShapeError, takes_shapes

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; Jordan et al. 2024
ITERATIONS = 5
WORD = 0xFFFFFFFF


def adamw_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    seed: int = 0,
    offsets: Sequence[int] | None = None,
) -> None:
    """Update weights and moments in place, as step number `step` (from 1 on).

    The rounding of an element of a bf16 weight follows from (seed, step, the weight's place in the list, the element's
    place in the weight) alone, however the weight is sharded and whoever computes it.

    Args:
        weights: fp32 or bf16, contiguous; gradients: of their shapes; exp_avgs, exp_avg_sqs: fp32 of their shapes.
        offsets: for shards, where each begins in its whole weight, in elements.

    Raises:
        LiaoyuanError: lists of different lengths, or tensors of different shapes.
    """
    lists = (weights, gradients, exp_avgs, exp_avg_sqs, offsets if offsets is not None else weights)
    if len({len(one) for one in lists}) > 1:
        raise LiaoyuanError(
            f"An AdamW step needs lists of one length, not {', '.join(str(len(one)) for one in lists)}."
        )
    first, second = betas
    scale = (1 - second**step) ** -0.5
    rates = [1 - learning_rate * weight_decay, learning_rate / (1 - first**step), 1 - first, second, 1 - second, scale]
    for place, tensors in enumerate(zip(weights, gradients, exp_avgs, exp_avg_sqs, strict=True)):
        weight, gradient, exp_avg, exp_avg_sq = tensors
        _check(place, tensors)
        slope = gradient if gradient.dtype in (weight.dtype, torch.float32) else gradient.float()
        function = ADAMW_STEP.call if takes(ADAMW_STEP, weight) else _adamw_step
        key, offset = _key(seed, step, place), offsets[place] if offsets else 0
        function(weight, slope, exp_avg, exp_avg_sq, [*rates, eps], key, offset)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all elements, fp64; summed in an order that depends on the shapes alone."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([square_sum(x) for x in tensors]).sum().sqrt()


@takes_shapes(x="float [...]")
def square_sum(x: Tensor) -> Tensor:
    """Return the sum of squares, fp64 []; within 1024 elements summed in fp32, so that these must be below 1e18."""
    return SQUARE_SUM.call(x) if takes(SQUARE_SUM, x) else _square_sum(x)


def clip(tensors: Sequence[Tensor], most: float) -> Tensor:
    """Scale tensors in place so that their global norm is at most `most`; return the norm before, fp64."""
    norm = global_norm(tensors)
    if most < norm < float("inf"):
        torch._foreach_mul_(list(tensors), float(most / norm))
    return norm


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return about U V^T for each of the matrices U S V^T: [..., M, N] -> fp32 [..., M, N] (Jordan et al. 2024).

    Five Newton-Schulz steps whose result has singular values between about 0.7 and 1.2. In bf16 where the device
    multiplies that fast; elsewhere it is many times slower than fp32.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    dtype = Device(matrices.device.type).default_dtype
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype).reshape(x.shape[:-2].numel(), *x.shape[-2:])
    for _ in range(ITERATIONS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).float().reshape(matrices.shape)


def _check(place: int, tensors: Sequence[Tensor]) -> None:
    weight = tensors[0]
    if all(x.shape == weight.shape and x.device == weight.device and x.is_floating_point() for x in tensors):
        return
    names = ("weights", "gradients", "exp_avgs", "exp_avg_sqs")
    given = (f"{name} {list(x.shape)} {str(x.dtype)[6:]} {x.device}" for name, x in zip(names, tensors, strict=True))
    raise ShapeError(f"adamw_step: tensors {place} are not floats of one shape on one device: {', '.join(given)}.")


def _adamw_step(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Sequence[float], key: int, offset: int
) -> None:
    keep, rate, first_rate, second_keep, second_rate, scale, eps = rates
    slope = gradient.to(first.dtype)
    first.lerp_(slope, first_rate)
    second.mul_(second_keep).addcmul_(slope, slope, value=second_rate)
    new = wide(weight) * keep - first / (second.sqrt() * scale + eps) * rate
    weight.copy_(_rounded_by_chance(new, key, offset) if weight.dtype is torch.bfloat16 else new)


def _rounded_by_chance(x: Tensor, key: int, offset: int) -> Tensor:
    """Return fp32 numbers that bf16 has too: element n goes up or down by the random number (key, offset + n)."""
    number = torch.arange(offset, offset + x.numel(), device=x.device).reshape(x.shape)
    random = _mixed((number * 0x9E3779B9 + key) & WORD) >> 16
    bits = (x.view(torch.int32) + random.int()) & -0x10000
    return torch.where(x.isnan(), x, bits.view(torch.float32))


def _mixed(x: Tensor) -> Tensor:
    """Return 32 mixed bits for every number, int64 (the finaliser of MurmurHash3, Appleby 2011)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def _key(seed: int, step: int, place: int) -> int:
    """Return 32 bits for one weight's update (splitmix64, Steele et al. 2014)."""
    state = 0
    for word in (seed, step, place):
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 32


def _square_sum(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _adamw_samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(14)
    for shape in ((3, 5), (70, 1000), (0,)):
        weight, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        first, second = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        yield weight, gradient, first, second, [0.99, 1e-2, 0.1, 0.95, 0.05, 1.5, 1e-8], 77, 5


def _adamw_workload(dtype: torch.dtype) -> tuple[Any, ...]:
    weight, gradient, first, second = torch.rand(4, 1 << 22)
    rates = [0.99, 1e-2, 0.1, 0.95, 0.05, 1.5, 1e-8]
    return weight.to(dtype), gradient.to(dtype), first, second, rates, 1, 0


ADAMW_STEP = register(
    Operator(
        name="adamw_step",
        kernels=(NATIVE, replace(triton("optimiser"), dtypes=KERNEL_DTYPES)),
        schema="(Tensor(a!) weight, Tensor gradient, Tensor(b!) first, Tensor(c!) second, float[] rates, int key, "
        "int offset) -> ()",
        reference=_adamw_step,
        fake=lambda *_: None,
        samples=_adamw_samples,
        flops=lambda *_: 0,
        workload=_adamw_workload,
        traffic=lambda weight, gradient, first, second, *_: 2 * weight.nbytes + gradient.nbytes + 4 * first.nbytes,
    )
)

SQUARE_SUM = register(
    Operator(
        name="square_sum",
        kernels=(NATIVE, triton("optimiser")),
        schema="(Tensor x) -> Tensor",
        reference=_square_sum,
        fake=lambda x: x.new_empty((), dtype=torch.float64),
        samples=lambda dtype: (
            (torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype),) for n in (5000, 70_001, 1, 0)
        ),
        flops=lambda x: 0,
        workload=lambda dtype: (torch.ones(1 << 24, dtype=dtype),),
        traffic=lambda x: x.nbytes,
    )
)
