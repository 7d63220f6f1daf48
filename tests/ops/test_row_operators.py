"""Norms against their definitions in fp64."""

import pytest
import torch

from liaoyuan.ops import add_rms_norm, rms_norm
from tests.ops.cases import difference, random

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def compare(function, definition, inputs, dtype, differentiable):
    """Check outputs and gradients of `function` against `definition` in fp64."""
    given = [x.detach().requires_grad_(i in differentiable) if torch.is_tensor(x) else x for i, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_(i in differentiable) if torch.is_tensor(x) and x.is_floating_point()
             else x for i, x in enumerate(inputs)]  # fmt: skip
    outputs, expected = function(*given), definition(*exact)
    outputs, expected = ((x,) if torch.is_tensor(x) else x for x in (outputs, expected))
    grads = [random(*x.shape, seed=50 + i) for i, x in enumerate(outputs)]
    found = torch.autograd.grad(outputs, [given[i] for i in differentiable],
                                [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])  # fmt: skip
    wanted = torch.autograd.grad(expected, [exact[i] for i in differentiable],
                                 [g.to(o.dtype).double() for g, o in zip(grads, outputs, strict=True)])  # fmt: skip
    for a, b in zip((*outputs, *found), (*expected, *wanted), strict=True):
        assert a.shape == b.shape
        assert difference(a, b, floor=0.1) < DTYPES[dtype]  # a norm of width 1 has hardly any gradient


def normed(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


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
