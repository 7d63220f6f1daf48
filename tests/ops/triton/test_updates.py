"""The optimiser's step and sums over whole tensors on accelerators."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liaoyuan.ops import checksum
from tests.ops.cases import difference, random
from tests.ops.triton.conftest import CARD, DEVICE
from tests.ops.triton.test_kernels import place

FEW = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
RATES = [0.99, 1e-2, 0.1, 0.95, 0.05, 1.5, 1e-8]


def state(*shape, dtype, gradient=1.0):
    weight, slope = random(*shape, dtype=dtype), gradient * random(*shape, dtype=dtype, seed=1)
    return weight, slope, gradient * random(*shape, seed=2), gradient * random(*shape, seed=3).abs()


def step(function, inputs, *numbers):
    inputs = [x.clone() for x in inputs]
    function(*inputs, *numbers)
    return [inputs[0], *inputs[2:]]


@FEW
@given(size=st.integers(0, 3000), key=st.integers(0, 2**32 - 1), offset=st.integers(0, 2**40))
def test_an_adamw_step_is_the_reference_s(use, size, key, offset):
    operator = use("adamw_step")
    inputs = place(*state(size, dtype=torch.float32))
    for a, b in zip(*(step(f, inputs, RATES, key, offset) for f in (operator.call, operator.reference)), strict=True):
        assert difference(a, b) < 1e-6


@FEW
@given(size=st.integers(1, 3000), key=st.integers(0, 2**32 - 1), offset=st.integers(0, 2**40))
def test_rounding_by_chance_has_the_reference_s_bits(use, size, key, offset):
    operator = use("adamw_step")
    inputs = place(*state(size, dtype=torch.bfloat16, gradient=0.0))  # what is rounded is then a single product
    found, expected = (step(f, inputs, RATES, key, offset)[0] for f in (operator.call, operator.reference))
    assert torch.equal(found, expected)


def test_a_shard_is_rounded_as_it_is_in_the_whole_weight(use):
    operator = use("adamw_step")
    inputs = place(*state(2500, dtype=torch.bfloat16))
    whole = step(operator.call, inputs, RATES, 77, 0)
    part = step(operator.call, [x[1300:] for x in inputs], RATES, 77, 1300)
    assert all(torch.equal(a[1300:], b) for a, b in zip(whole, part, strict=True))


def test_what_is_no_number_stays_none_and_strides_are_kept(use):
    operator = use("adamw_step")
    weight, *others = (x.t() for x in state(8, 5, dtype=torch.bfloat16))
    weight[0, 0], weight[1, 1] = torch.nan, torch.inf
    placed = place(weight, *others)
    found, expected = (step(f, placed, RATES, 5, 0)[0] for f in (operator.call, operator.reference))
    assert found[0, 0].isnan() and found[1, 1] == torch.inf
    assert difference(found[2:].float(), expected[2:].float()) < 1e-2


@FEW
@given(size=st.integers(0, 5000))
def test_square_sum(use, size):
    x = random(size)
    found = use("square_sum").call(*place(x))
    assert found.dtype is torch.float64
    assert abs(float(found) - float(x.double().square().sum())) <= 1e-6 * max(float(found), 1e-30)


@FEW
@given(size=st.integers(0, 20_000), start=st.integers(0, 9))
def test_the_checksum_is_that_of_the_cpu(use, size, start):
    data = torch.randint(256, (size + start,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))[start:]
    operator = use("checksum")
    assert int(operator.call(*place(data))) == int(operator.reference(data))


def test_one_program_takes_many_blocks_where_a_launch_has_few(use, monkeypatch):
    data = torch.randint(256, (50_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs, x = state(5000, dtype=torch.bfloat16), random(5000)
    operators = [use(name) for name in ("checksum", "square_sum", "adamw_step")]
    before = [
        operators[0].call(*place(data)),
        operators[1].call(*place(x)),
        *step(operators[2].call, place(*inputs), RATES, 1, 0),
    ]
    for module in ("buffers", "optimiser"):
        monkeypatch.setattr(f"liaoyuan.ops.triton.{module}.programs", lambda parts: min(parts, 2))
    after = [
        operators[0].call(*place(data)),
        operators[1].call(*place(x)),
        *step(operators[2].call, place(*inputs), RATES, 1, 0),
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_tensor_s_checksum_is_the_same_on_the_accelerator(use):
    if not CARD:  # where there is one, its kernel is the one that is chosen
        use("checksum")
    x = random(70, 3)
    assert checksum(x.to(DEVICE)) == checksum(x)
