"""Weights of few bits: off by half a step at most, multiplied as what they stand for, every row the same bits alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import QuantisedWeight, dequantise, quantise, quantised_linear
from liaoyuan.ops.choice import takes
from liaoyuan.ops.quantised_linear import QUANTISED_LINEAR
from tests.ops.cases import difference, random

WAYS = [
    ("int8", None, True), ("int8", 32, True), ("int8", 64, True), ("int8", 128, True), ("fp8", None, True),
    *(("int4", group, symmetric) for group in (32, 64, 128) for symmetric in (True, False)),
]  # fmt: skip
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 200), (32, 128), (3, 31), (0, 64), (4, 0)])
def test_a_weight_comes_back_within_half_a_step(way, shape):
    weight = random(*shape) * random(shape[0], 1, seed=1).exp() + 0.5
    quantised = quantise(weight, *way)
    found, size = dequantise(quantised), quantised.group or max(shape[1], 1)
    step = quantised.scales.float().repeat_interleave(size, 1)[:, : shape[1]]
    bound = step / 2 if way[0] != "fp8" else (weight.abs() / 16).maximum(step / 1024)
    assert found.shape == weight.shape and found.dtype is torch.float32
    assert ((found - weight).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_few_bytes_are_kept(way):
    weight = random(64, 1024)
    bits = {"int8": 8, "fp8": 8, "int4": 4}[way[0]] + 16 / (way[1] or 1024) + (0 if way[2] else 8 / way[1])
    assert quantise(weight, *way).nbytes == weight.numel() * bits / 8


@pytest.mark.parametrize("way", [way for way in WAYS if way[2]], ids=str)
def test_what_was_quantised_is_quantised_to_itself(way):
    once = dequantise(quantise(random(6, 256).clamp(-2, 2), *way))
    assert difference(dequantise(quantise(once, *way)), once) < 0.02  # but for the scale, rounded to bf16 anew


def test_zeros_tiny_and_huge_weights_survive():
    for kind, group, symmetric in WAYS:
        for value in (0.0, 1e-42, -1e-30, 3e38):
            weight = torch.full((2, 64), value)
            found = dequantise(quantise(weight, kind, group, symmetric))
            assert found.isfinite().all() and (found - weight).abs().max() <= max(abs(value) / 14, 1e-36)


def test_a_half_precision_weight_is_taken():
    weight = random(4, 64, dtype=torch.bfloat16).requires_grad_()
    assert torch.equal(dequantise(quantise(weight, "int8")), dequantise(quantise(weight.float(), "int8")))


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    rows=st.sampled_from([0, 1, 2, 3, 4, 5, 16, 23, 261]),
    depth=st.sampled_from([1, 31, 32, 96, 127, 128, 129, 300, 1024, 2085]),
    out=st.sampled_from([1, 3, 4, 33, 70]),
    dtype=st.sampled_from(list(DTYPES)),
    with_bias=st.booleans(),
)
def test_the_product_is_that_of_what_the_weight_stands_for(way, rows, depth, out, dtype, with_bias):
    weight = quantise(random(out, depth) + 0.2, *way)
    x, bias = random(rows, depth, dtype=dtype, seed=1), random(out, dtype=dtype, seed=2) if with_bias else None
    found = quantised_linear(x, weight, bias)
    expected = F.linear(x.double(), dequantise(weight).double(), None if bias is None else bias.double())
    assert found.dtype is dtype and found.shape == (rows, out)
    assert difference(found, expected, floor=0.1) < DTYPES[dtype]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [300, 2085])
def test_a_rows_bits_depend_on_that_row_alone(way, dtype, depth):
    x, weight = random(300, depth, dtype=dtype), quantise(random(77, depth, seed=1), *way)
    if not takes(QUANTISED_LINEAR, x):
        pytest.skip("the reference makes no such promise")
    whole = quantised_linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 8, 16, 17, 32, 128):
        assert torch.equal(quantised_linear(x[:rows], weight), whole[:rows])
        assert torch.equal(quantised_linear(x[-rows:], weight), whole[-rows:])
    torch.set_num_threads(2)
    try:
        assert torch.equal(quantised_linear(x, weight), whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("fp8", None), ("int4", 32)])
def test_every_byte_stands_for_its_number(kind, group, dtype):
    data = torch.arange(256, dtype=torch.uint8).repeat(1, 8)[:, : 2048 if kind != "int4" else 1024]
    data = data.where(data & 127 != 127, 0) if kind == "fp8" else data  # there they are not numbers
    scales = torch.ones(1, 2048 // group if group else 1, dtype=torch.bfloat16)
    weight = QuantisedWeight(data.view(torch.int8) if kind == "int8" else data, scales, None, kind, group, (1, 2048))
    for rows in (1, 5):  # in registers, and by way of the cache
        found = torch.cat([quantised_linear(x, weight) for x in torch.eye(2048, dtype=dtype)[:512].split(rows)])
        assert torch.equal(found[:, 0].float(), dequantise(weight)[0, :512])


def test_any_leading_shape_strides_and_other_dtypes_are_taken():
    weight = quantise(random(8, 64), "int4", 32)
    x = random(64, 2, 3, seed=1).permute(2, 1, 0)
    expected = F.linear(x.double(), dequantise(weight).double())
    assert difference(quantised_linear(x, weight), expected) < 1e-5
    assert difference(quantised_linear(x.double(), weight), expected) < 1e-12
    assert quantised_linear(x[0, 0], weight).shape == (8,)
    assert quantised_linear(x[0, 0].half(), weight).dtype is torch.float16


def test_a_weight_that_is_not_finite_is_refused():
    for value in (torch.nan, torch.inf, -torch.inf):
        weight = random(3, 32)
        weight[1, 4:6] = value
        with pytest.raises(LiaoyuanError, match=r"\[3, 32\] has 2 elements that are infinite or not a number"):
            quantise(weight, "int8")


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (("int5",), "no quantised weights of kind 'int5'. There are: int8, int4, fp8"),
        (("int4",), "groups of 32 or 64 or 128 along its depth, not None"),
        (("int8", 48), "groups of None or 32 or 64 or 128 along its depth, not 48"),
        (("fp8", 32), "groups of None along its depth, not 32"),
        (("int8", None, False), "Only int4 has zero points"),
    ],
)
def test_a_way_that_does_not_exist_is_refused(way, said):
    with pytest.raises(LiaoyuanError, match=said):
        quantise(random(4, 64), *way)


def test_shapes_that_do_not_fit_are_named():
    weight = quantise(random(4, 64), "int8")
    with pytest.raises(LiaoyuanError, match=r"x \[2, 63\] do not fit a quantised weight \[4, 64\]"):
        quantised_linear(random(2, 63), weight)
    with pytest.raises(LiaoyuanError, match=r"x \[2, 64\] and bias \[5\] do not fit"):
        quantised_linear(random(2, 64), weight, random(5))
    with pytest.raises(LiaoyuanError, match=r"not \[3\] of float32"):
        quantise(random(3), "int8")
