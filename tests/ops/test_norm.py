"""Norms against their definitions in fp64; how their elements are rounded, and that a row's bits are its own."""

import pytest
import torch
from torch import Tensor

from liaoyuan.ops import add_rms_norm, rms_norm
from tests.ops.cases import DTYPES, compare, difference, normed, random, torch_threads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 24), (200, 320), (0, 16)])
def test_norms(rows, width, dtype):
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    weight = 1 + 0.1 * random(width, seed=2).to(dtype)
    compare(rms_norm, normed, (x, weight, 1e-5), dtype, (0, 1))

    def added(residual, x, weight, eps):
        stored = (residual + x).detach().to(dtype).double()
        total = residual + x + (stored - (residual + x).detach())
        return total, normed(total, weight, eps)

    compare(add_rms_norm, added, (residual, x, weight, 1e-5), dtype, (0, 1, 2))


def test_norm_takes_any_leading_shape_and_strides():
    x, weight = random(4, 6, 32).transpose(0, 1), torch.ones(32)
    assert difference(rms_norm(x, weight, 1e-6), normed(x.double(), weight.double(), 1e-6)) < 1e-6


def test_an_unused_output_of_add_rms_norm_gives_no_gradient():
    x, residual, weight = random(5, 16).requires_grad_(), random(5, 16, seed=1).requires_grad_(), random(16, seed=2)
    total, out = add_rms_norm(residual, x, weight, 1e-6)
    assert torch.equal(torch.autograd.grad(total.sum(), x, retain_graph=True)[0], torch.ones(5, 16))
    expected = torch.autograd.grad(normed(residual + x, weight, 1e-6).pow(2).sum(), x)[0]
    assert difference(torch.autograd.grad(out.pow(2).sum(), x)[0], expected) < 1e-5


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


def test_every_number_is_rounded_as_torch_rounds_it():
    """All bf16 numbers, denormal ones too, added to others of their size and to their neighbours' halves."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for other in (every.flip(0), every[torch.randperm(2**16, generator=generator)], every.roll(1), every / 2):
        total, _ = add_rms_norm(every.view(64, -1), other.view(64, -1), torch.ones(1024, dtype=torch.bfloat16), 1e-6)
        expected = (every + other).view(64, -1)
        is_number = ~expected.isnan()
        assert torch.equal(total.isnan(), ~is_number)
        assert torch.equal(bits(total)[is_number], bits(expected)[is_number])


def test_a_norm_keeps_denormal_numbers():
    x, weight = (torch.full(shape, value).bfloat16() for shape, value in (((2, 70), 1e-38), ((70,), 0.1)))
    out = rms_norm(x, weight, 1.0)  # divided by one: what is left is the product with the weight
    expected = x.float() * weight.float()
    assert (expected > 0).all() and torch.equal(out, expected.bfloat16())


def gradients(x: Tensor, residual: Tensor, weight: Tensor, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
    outputs = add_rms_norm(leaves[1], leaves[0], weight, 1e-6)
    alone = rms_norm(leaves[0], weight, 1e-6)
    found = torch.autograd.grad((*outputs, alone), leaves, (*grads, grads[1]))
    return [*(out.detach() for out in outputs), alone.detach(), *found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 31, 100, 320])
def test_a_norms_bits_do_not_depend_on_the_rows_beside_it(width, dtype):
    x, residual, *grads = (random(70, width, dtype=dtype, seed=i) for i in range(4))
    weight = random(width, dtype=dtype, seed=5)
    whole = gradients(x, residual, weight, tuple(grads))
    for first, last in ((0, 1), (3, 8), (1, 70), (69, 70)):
        part = gradients(x[first:last], residual[first:last], weight, tuple(g[first:last] for g in grads))
        assert all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit_of_a_norm(dtype):
    x, grad = random(300, 500, dtype=dtype).requires_grad_(), random(300, 500, dtype=dtype, seed=1)
    weight = random(500, dtype=dtype, seed=2).requires_grad_()

    def both() -> list[Tensor]:
        out = rms_norm(x, weight, 1e-6)
        return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]

    once = both()
    with torch_threads(2):
        assert all(torch.equal(a, b) for a, b in zip(once, both(), strict=True))


def test_a_strided_row_is_normed_as_its_copy():
    x, weight = random(40, 9, 64, dtype=torch.bfloat16)[:, 2], random(64, dtype=torch.bfloat16, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))
