"""Linear layers on accelerators: the reference's numbers in any shape, and one order for every sum."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liaoyuan.ops import quantise
from liaoyuan.ops.triton import launch
from tests.ops.cases import random
from tests.ops.triton.conftest import DEVICE
from tests.ops.triton.test_kernels import agree, place

FEW = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
WIDTHS = st.integers(1, 150)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@FEW
@given(rows=st.integers(0, 150), width=WIDTHS, out=WIDTHS, with_bias=st.booleans(), with_residual=st.booleans())
def test_linear(use, rows, width, out, with_bias, with_residual):
    bias = random(out, seed=2) if with_bias else None
    residual = random(rows, out, seed=3) if with_residual else None
    agree(use("linear"), random(rows, width), random(out, width, seed=1), bias, residual)


def test_linear_takes_transposed_inputs(use):
    agree(use("linear"), random(40, 70).t(), random(40, 33, seed=1).t(), random(66, seed=2)[::2], None)


@DTYPES
def test_a_row_of_a_linear_layer_has_the_same_bits_in_any_batch(use, dtype):
    x, weight, bias = random(150, 100, dtype=dtype), random(70, 100, dtype=dtype, seed=1), random(70, dtype=dtype)
    operator = use("linear")
    whole = operator.call(*place(x, weight, bias, None))
    for rows in (slice(0, 1), slice(0, 16), slice(66, 67), slice(3, 150)):
        assert torch.equal(operator.call(*place(x[rows], weight, bias, None)), whole[rows])
    backward = torch.ops.liaoyuan.linear_backward
    grad = random(150, 70, dtype=dtype, seed=3)
    grads = backward(*place(grad, x, weight, False))[0]
    assert torch.equal(backward(*place(grad[80:], x[80:], weight, False))[0], grads[80:])


TILES = [(most, place) for most in launch.PRODUCT for place in range(2)]


@pytest.mark.parametrize(("most", "place_"), TILES)
def test_every_tile_computes_the_product(use, most, place_, monkeypatch):
    monkeypatch.setattr("liaoyuan.ops.triton.linear.tile_of", lambda *_: launch.PRODUCT[most][place_])
    agree(use("linear"), random(min(most, 130), 300), random(150, 300, seed=1), random(150, seed=2), None)


@pytest.mark.parametrize("agreeing", [True, False])
def test_tiles_follow_the_rows_where_all_give_the_same_bits_alone(agreeing, monkeypatch):
    from liaoyuan.ops.triton import linear

    monkeypatch.setattr(linear, "tiles_agree", lambda *_: agreeing)
    few, many = (linear.tile_of(rows, 8192, torch.empty(0, dtype=torch.bfloat16)) for rows in (1, 4096))
    assert (few, many) == ((launch.PRODUCT[16][0], launch.PRODUCT[launch.UNBOUNDED][0]) if agreeing else (few, few))
    assert agreeing or few == launch.ANY_SHAPE


@pytest.mark.parametrize(("planted", "expected"), [(None, True), ("bits", False), ("failure", False)])
def test_whether_tiles_agree_is_tried(use, planted, expected, monkeypatch):
    from liaoyuan.ops.triton import linear

    use("linear")
    run = linear._run

    def one_tile_for_all(kernel, left, right, bias, residual, out, tile):
        if tile != launch.ANY_SHAPE and planted == "failure":
            raise RuntimeError("out of resources")
        run(kernel, left, right, bias, residual, out, launch.ANY_SHAPE)
        if tile == launch.PRODUCT[64][1] and planted == "bits":
            out[0, 0] *= 1.01

    monkeypatch.setattr(linear, "_run", one_tile_for_all)
    assert linear.tiles_agree.__wrapped__(torch.bfloat16, torch.device(DEVICE)) is expected


@FEW
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6), width=WIDTHS, out=WIDTHS, with_bias=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_grouped_linear(use, sizes, width, out, with_bias, dtype):
    x, weight = random(sum(sizes), width), random(len(sizes), out, width, seed=1)
    bias = random(len(sizes), out, seed=2) if with_bias else None
    agree(use("grouped_linear"), x, weight, torch.tensor(sizes, dtype=dtype), bias)


@DTYPES
def test_a_row_of_an_expert_has_the_same_bits_whatever_others_have(use, dtype):
    sizes = (70, 0, 3, 40)
    x, weight = random(sum(sizes), 50, dtype=dtype), random(4, 60, 50, dtype=dtype, seed=1)
    operator = use("grouped_linear")
    whole = operator.call(*place(x, weight, torch.tensor(sizes), None)).split(sizes)
    for expert, rows in enumerate(x.split(sizes)):
        alone = torch.zeros(4, dtype=torch.long)
        alone[expert] = len(rows[:33])
        assert torch.equal(operator.call(*place(rows[:33], weight, alone, None)), whole[expert][:33])


def test_sizes_that_exceed_the_rows_reach_no_other_memory(use):
    x, weight = random(5, 8), random(2, 6, 8, seed=1)
    operator = use("grouped_linear")
    found = operator.call(*place(x, weight, torch.tensor([3, 40]), None))
    assert torch.equal(found, operator.call(*place(x, weight, torch.tensor([3, 2]), None)))


@FEW
@given(
    rows=st.integers(0, 40), depth=st.integers(1, 300), out=WIDTHS, with_bias=st.booleans(),
    kind=st.sampled_from(
        [("int8", None, True), ("int8", 64, True), ("fp8", None, True), ("int4", 32, True), ("int4", 128, False)]
    ),
)  # fmt: skip
def test_quantised_linear(use, rows, depth, out, with_bias, kind):
    weight = quantise(random(out, depth, seed=1) + 0.2, *kind)
    bias = random(out, seed=2) if with_bias else None
    parts = (weight.data, weight.scales, weight.zeros, bias, weight.kind, weight.group or 0)
    agree(use("quantised_linear"), random(rows, depth), *parts)


def test_every_number_of_fp8_is_read_right(use):
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers % 128 != 127]  # these two are no numbers
    one, scale = torch.ones(1, 1), torch.ones(len(numbers), 1, dtype=torch.bfloat16)
    found = use("quantised_linear").call(*place(one, numbers[:, None], scale, None, None, "fp8", 0))
    assert torch.equal(found[0].cpu(), numbers.view(torch.float8_e4m3fn).float())


def test_a_row_with_few_bit_weights_has_the_same_bits_in_any_batch(use):
    operator, x = use("quantised_linear"), random(40, 200, dtype=torch.bfloat16)
    for kind, group in (("int8", 32), ("int4", 64)):
        weight = quantise(random(30, 200, seed=1), kind, group)
        parts = (weight.data, weight.scales, weight.zeros, None, kind, group)
        whole = operator.call(*place(x, *parts))
        assert torch.equal(operator.call(*place(x[17:18], *parts)), whole[17:18])
