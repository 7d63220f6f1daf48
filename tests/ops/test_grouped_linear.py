"""Rows of many experts in one product: its definition in fp64, its bits, its memory, what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.ops import grouped_linear, status
from liaoyuan.ops.grouped_linear import _grouped_linear
from tests.ops.cases import difference, random

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@pytest.fixture
def native_only():
    if next(s for s in status() if s.operator == "grouped_linear").kernel != "native":
        pytest.skip("torch's own product makes no such promise")


def inputs(sizes, out, width, dtype, with_bias=False):
    x, weight = random(sum(sizes), width, dtype=dtype), random(len(sizes), out, width, dtype=dtype, seed=1)
    return x, weight, torch.tensor(sizes), random(len(sizes), out, dtype=dtype, seed=2) if with_bias else None


def one_by_one(x, weight, sizes, bias):
    """Each expert's rows on their own, in fp64."""
    parts = x.double().split(sizes.tolist())
    shifts = [None] * len(parts) if bias is None else bias.double()
    return torch.cat([F.linear(*group) for group in zip(parts, weight.double(), shifts, strict=True)])


def gradients(function, given, grad):
    leaves = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in given]
    found = function(*leaves)
    sources = [x for x in leaves if x is not None and x.is_floating_point()]
    return [found, *torch.autograd.grad(found, sources, grad.to(found.dtype))]


def check(given, dtype):
    grad = random(len(given[0]), given[1].shape[1], seed=3).to(dtype)
    pairs = zip(gradients(grouped_linear, given, grad), gradients(one_by_one, given, grad), strict=True)
    for actual, expected in pairs:
        assert actual.shape == expected.shape and actual.dtype is dtype
        assert difference(actual, expected, floor=0.1) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("sizes", "out", "width"),
    [
        ((1,), 1, 1),
        ((3, 0, 1, 2), 40, 24),
        ((0, 0), 5, 8),
        ((7, 25, 300), 70, 129),
        ((24, 25), 17, 1100),  # both ways to a gradient of x, and more columns than one task takes
        ((2,) * 40, 33, 31),
    ],
    ids=str,
)
def test_each_group_is_multiplied_with_the_matrix_of_its_expert(sizes, out, width, with_bias, dtype):
    check(inputs(sizes, out, width, dtype, with_bias), dtype)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    out=st.integers(1, 140),
    width=st.integers(1, 140),
    with_bias=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_shapes(sizes, out, width, with_bias, dtype):
    check(inputs(sizes, out, width, dtype, with_bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 321])
def test_the_bits_of_a_row_do_not_depend_on_how_many_rows_its_expert_has(width, dtype, native_only):
    x, weight, _, _ = inputs((100,), 96, width, dtype)
    grad = random(100, 96, dtype=dtype, seed=3)
    whole, whole_x, _ = gradients(lambda x, w: grouped_linear(x, w, torch.tensor([100])), (x, weight), grad)
    for first, last in ((0, 1), (0, 2), (3, 8), (50, 74), (50, 75), (99, 100)):
        part = torch.tensor([last - first])
        found, found_x, _ = gradients(
            lambda x, w, part=part: grouped_linear(x, w, part), (x[first:last], weight), grad[first:last]
        )
        assert torch.equal(found, whole[first:last])
        assert torch.equal(found_x, whole_x[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_group_do_not_depend_on_the_other_groups_or_the_threads(dtype, native_only):
    given = inputs((5, 0, 40, 1), 130, 70, dtype, with_bias=True)
    grad = random(46, 130, dtype=dtype, seed=3)
    whole = gradients(grouped_linear, given, grad)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(map(torch.equal, gradients(grouped_linear, given, grad), whole))
    finally:
        torch.set_num_threads(threads)
    x, weight, _, bias = given
    alone = gradients(grouped_linear, (x[5:45], weight[2:3], torch.tensor([40]), bias[2:3]), grad[5:45])
    parts = [whole[0][5:45], whole[1][5:45], whole[2][2:3], whole[3][2:3]]
    assert all(map(torch.equal, alone, parts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_computed_by_the_reference(dtype):
    given = inputs((3, 0, 2), 5, 8, dtype, with_bias=True)
    assert difference(grouped_linear(*given), one_by_one(*given)) < (1e-12 if dtype is torch.float64 else 1e-2)


def test_strides_and_int32_sizes_are_taken():
    x, weight, sizes, _ = inputs((3, 4), 6, 10, torch.float32)
    expected = one_by_one(x, weight, sizes, None)
    strided = x.t().contiguous().t(), weight.transpose(1, 2).contiguous().transpose(1, 2), sizes.int()
    assert difference(grouped_linear(*strided), expected) < 1e-6
    view = random(7, 21, dtype=torch.bfloat16)[:, 1:11]
    assert (
        difference(grouped_linear(view, weight.bfloat16(), sizes), one_by_one(view, weight.bfloat16(), sizes, None))
        < 1e-2
    )


def test_an_infinite_row_stays_in_its_place():
    """What pads the last word of a row is not its neighbour."""
    x, weight, sizes, _ = inputs((4, 3), 6, 33, torch.bfloat16)
    x[3] = float("inf")
    assert grouped_linear(x, weight, sizes)[[0, 1, 2, 4, 5, 6]].isfinite().all()


def test_experts_without_rows_get_a_gradient_of_zero():
    x, weight, sizes, bias = inputs((0, 5, 0), 6, 33, torch.bfloat16, with_bias=True)
    _, _, grad_weight, grad_bias = gradients(grouped_linear, (x, weight, sizes, bias), random(5, 6))
    assert not grad_weight[[0, 2]].any() and not grad_bias[[0, 2]].any() and grad_weight[1].all()


@pytest.mark.parametrize("function", [grouped_linear, _grouped_linear])
@pytest.mark.parametrize("sizes", [[3, 3], [9, -2], [3, 5]])
def test_sizes_that_do_not_add_up_are_refused(sizes, function):
    x, weight, _, _ = inputs((3, 4), 6, 10, torch.float32)
    with pytest.raises(RuntimeError, match="sizes"):
        function(x, weight, torch.tensor(sizes), None)


@pytest.mark.parametrize(
    ("x", "weight", "sizes", "bias", "said"),
    [
        ((7, 9), (2, 6, 10), (2,), None, r"weight \[2, 6, 10\] does not fit x \[7, 9\]: K is 10 and 9"),
        ((7, 10), (6, 10), (2,), None, r"weight \[6, 10\] is not \[E, O, K\]"),
        ((7, 10), (2, 6, 10), (3,), None, r"sizes \[3\] does not fit weight \[2, 6, 10\]: E is 3 and 2"),
        ((7, 10), (2, 6, 10), (2,), (2, 5), r"bias \[2, 5\] does not fit weight \[2, 6, 10\]: O is 5 and 6"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, weight, sizes, bias, said):
    with pytest.raises(ValueError, match=said):
        grouped_linear(
            torch.ones(x), torch.ones(weight), torch.ones(sizes).long(), None if bias is None else torch.ones(bias)
        )


GROWTH = """
import torch
from pathlib import Path
from liaoyuan.ops import grouped_linear

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def step(rows):
    sizes = torch.tensor([rows, 2 * rows, 401 - 3 * rows])
    x = torch.ones(401, 96, dtype=torch.bfloat16, requires_grad=True)
    grouped_linear(x, weight, sizes).sum().backward()

weight = torch.ones(3, 64, 96, dtype=torch.bfloat16, requires_grad=True)
step(0), step(1)
before = resident()
for rows in range(2, 130):
    step(rows)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_numbers_of_rows_seen(native_only):
    found = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120, check=True)
    assert int(found.stdout) < 4 << 20
