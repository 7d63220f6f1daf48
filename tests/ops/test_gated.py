"""Gated activations are those of torch and transformers, with gradients, and a row's bits depend on it alone."""

import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import clamped_swiglu, geglu, status, swiglu
from tests.ops.cases import DTYPES, compare, random

LIMIT, ALPHA = 7.0, 1.702
FUNCTIONS = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu by tanh": lambda x: geglu(x, approximate=True),
    "clamped_swiglu": lambda x: clamped_swiglu(x, LIMIT, ALPHA),
}
everyone = pytest.mark.parametrize("name", FUNCTIONS)


def clamped_by_transformers(gate_up):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts._apply_gate(types.SimpleNamespace(limit=LIMIT, alpha=ALPHA), gate_up)


DEFINITIONS = {
    "swiglu": lambda x: F.silu(x[:, ::2]) * x[:, 1::2],
    "geglu": lambda x: F.gelu(x[:, ::2]) * x[:, 1::2],
    "geglu by tanh": lambda x: F.gelu(x[:, ::2], approximate="tanh") * x[:, 1::2],
    "clamped_swiglu": clamped_by_transformers,
}


@pytest.fixture
def kernels():
    """Skip what is promised of the kernels alone where there are none."""
    if any(row.kernel != "native" for row in status() if row.operator.endswith("glu")):
        pytest.skip("needs the native kernels")


@everyone
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 40), width=st.integers(1, 120), size=st.sampled_from([0.1, 3, 20]), data=st.data())
def test_results_and_gradients_are_those_of_the_definition(name, rows, width, size, data):
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    compare(FUNCTIONS[name], DEFINITIONS[name], (size * random(rows, 2 * width, dtype=dtype),), dtype, (0,))


@pytest.mark.parametrize(("act", "approximate"), [("gelu", False), ("gelu_pytorch_tanh", True)])
def test_geglu_is_the_one_that_transformers_knows_by_the_name(act, approximate):
    from transformers.activations import ACT2FN

    x = 3 * random(50, 64)
    assert torch.allclose(geglu(x, approximate), ACT2FN[act](x[:, ::2]) * x[:, 1::2], rtol=1e-6, atol=1e-6)


@everyone
def test_fp32_is_right_to_a_few_units_in_the_last_place(name):
    gate = torch.linspace(-30, 30, 100_001)
    x = torch.stack((gate, torch.ones_like(gate)), 1).flatten()[None]
    found, exact = FUNCTIONS[name](x), DEFINITIONS[name](x.double())
    assert ((found - exact).abs() <= 4e-7 * exact.abs() + 1.5e-7 * gate.abs().clamp(1e-3, 1)).all()


@everyone
def test_large_and_strange_numbers_are_treated_as_by_torch(name):
    gate = torch.tensor([0.0, -0.0, 88, -88, 127, -127, 1e4, -1e4, 1e18, float("inf"), float("nan"), 3.0])
    up = torch.ones(12)
    up[11] = float("nan")
    x = torch.stack((gate, up), 1).flatten()[None]
    assert torch.allclose(FUNCTIONS[name](x), DEFINITIONS[name](x), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_beyond_the_limit_there_is_no_gradient():
    x = torch.tensor([[8.0, 1.0, 7.0, 7.0, -50.0, 9.0, 1.0, -7.5]]).requires_grad_()
    y = x.detach().double().requires_grad_()
    found = torch.autograd.grad(clamped_swiglu(x, LIMIT, ALPHA).sum(), x)[0]
    expected = torch.autograd.grad(clamped_by_transformers(y).sum(), y)[0]
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert found[0, 0] == found[0, 5] == found[0, 7] == 0


@everyone
def test_bf16_is_fp32_rounded_as_torch_rounds(name, kernels):
    """All gates that bf16 has, with up small enough for numbers that are denormal, and with NaN and infinity."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for up in (1.0, -1.3e-38, 3e-39, float("inf")):
        x = torch.stack((gate, torch.full_like(gate, up)), 1).reshape(64, -1)
        wide, narrow = x.float().requires_grad_(), x.clone().requires_grad_()
        exact, found = FUNCTIONS[name](wide), FUNCTIONS[name](narrow)
        expected = exact.bfloat16()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
        exact, found = (torch.autograd.grad(y.sum(), z)[0] for y, z in ((exact, wide), (found, narrow)))
        expected = exact.bfloat16()
        assert torch.equal(found.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


@everyone
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 21, 160, 700])
def test_the_bits_of_a_row_depend_on_it_alone(name, dtype, width, kernels):
    def both(x, grad):
        x = x.clone().requires_grad_()
        out = FUNCTIONS[name](x)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    x, grad = 3 * random(130, 2 * width, dtype=dtype), random(130, width, dtype=dtype, seed=1)
    whole = both(x, grad)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for part in (slice(0, 130), slice(7, 8), slice(64, 97), slice(129, 130)):
                assert all(torch.equal(a, b[part]) for a, b in zip(both(x[part], grad[part]), whole, strict=True))
        finally:
            torch.set_num_threads(1)


@everyone
def test_strides_and_leading_dimensions_are_taken(name):
    x = 3 * random(12, 4, 6).transpose(0, 1)
    whole = FUNCTIONS[name](x)
    assert whole.shape == (4, 12, 3)
    assert torch.allclose(whole[2], FUNCTIONS[name](x[2]), atol=1e-6)
    assert torch.allclose(FUNCTIONS[name](random(8, 20).t()), DEFINITIONS[name](random(8, 20).t()), atol=1e-6)


@everyone
def test_an_odd_width_is_refused_with_its_size(name):
    with pytest.raises(LiaoyuanError, match=r"gate_up \[3, 5\].*odd"):
        FUNCTIONS[name](torch.zeros(3, 5))


@everyone
def test_fp64_is_computed_in_fp64(name):
    x = random(5, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(FUNCTIONS[name], x)
