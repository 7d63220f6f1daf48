"""Norms, rotary embedding, SwiGLU and token log-probability against their definitions in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from liaoyuan.ops import add_rms_norm, rms_norm, split_rotary, swiglu, token_log_prob
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 21), (150, 200), (0, 16)])
def test_swiglu(rows, width, dtype):
    def definition(gate_up):
        return F.silu(gate_up[:, ::2]) * gate_up[:, 1::2]

    compare(swiglu, definition, (3 * random(rows, 2 * width, dtype=dtype),), dtype, (0,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "dim"), [(1, 1, 1, 16), (40, 2, 3, 24), (130, 1, 2, 64), (3, 2, 1, 2)]
)
def test_split_rotary(rows, heads, groups, dim, with_norm, dtype):
    qkv = random(rows, heads * (groups + 2) * dim, dtype=dtype)
    angle = torch.rand(rows, dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    norms = [1 + 0.1 * random(dim, seed=i).to(dtype) for i in (2, 3)] if with_norm else [None, None]

    def definition(qkv, cosine, sine, heads, dim, query_norm, key_norm, eps):
        rotation = torch.complex(cosine, sine)[:, None]
        parts = qkv.view(rows, heads, groups + 2, dim)
        query, key, value = parts[:, :, :-2].reshape(rows, -1, dim), parts[:, :, -2], parts[:, :, -1]
        if query_norm is not None:
            query, key = normed(query, query_norm, eps), normed(key, key_norm, eps)
        turned = (torch.complex(*x.chunk(2, -1)) * rotation for x in (query, key))
        return *(torch.cat((x.real, x.imag), -1) for x in turned), value

    inputs = (qkv, angle.cos(), angle.sin(), heads, dim, *norms, 1e-6)
    compare(split_rotary, definition, inputs, dtype, (0, 5, 6) if with_norm else (0,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 1), (50, 32, 17), (37, 64, 1000), (9000, 16, 1500)])
def test_token_log_prob(rows, width, vocabulary, dtype):
    hidden, weight = random(rows, width, dtype=dtype), 0.3 * random(vocabulary, width, dtype=dtype, seed=1)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2))

    def definition(hidden, weight, targets):
        return F.log_softmax(hidden @ weight.t(), -1).gather(-1, targets[:, None]).squeeze(-1)

    compare(token_log_prob, definition, (hidden, weight.to(dtype), targets), dtype, (0, 1))


def test_token_log_prob_of_a_large_vocabulary_keeps_no_logits():
    hidden, weight = random(40, 16).requires_grad_(), random(1_000_000, 16, seed=1).requires_grad_()
    targets = torch.arange(40) * 20_000
    result = token_log_prob(hidden, weight, targets)
    assert all(x.numel() <= weight.numel() for x in result.grad_fn.saved_tensors) if hasattr(
        result.grad_fn, "saved_tensors") else True  # fmt: skip
    expected = F.log_softmax(hidden.detach() @ weight.detach().t(), -1)[torch.arange(40), targets]
    assert difference(result, expected) < 1e-5


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises((RuntimeError, IndexError)):
        token_log_prob(random(2, 8), random(5, 8), torch.tensor([1, 5]))


def test_a_very_unlikely_token_has_a_finite_log_probability():
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [500.0]])
    assert math.isclose(token_log_prob(hidden, weight, torch.tensor([0])).item(), -500.0, rel_tol=1e-6)
