"""The linear layer against its definition in fp64; the bits of a row; what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from liaoyuan.ops import exact_rows, linear, status
from liaoyuan.ops.shapes import ShapeError
from tests.ops.cases import difference, random

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
COUNTS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 48, 49, 64, 65, 96, 97, 150)


@pytest.fixture
def exact_only():
    if not exact_rows():
        pytest.skip("torch's own product makes no such promise")


def inputs(rows, width, out, dtype, with_bias=False, with_residual=False):
    x, weight, bias, residual = (
        random(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate(((rows, width), (out, width), (out,), (rows, out)))
    )
    return x, weight, bias if with_bias else None, residual if with_residual else None


def definition(x, weight, bias, residual):
    return x @ weight.t() + (0 if bias is None else bias) + (0 if residual is None else residual)


def results(function, given, grad, wide=False):
    """Return the output and the gradients of all that is given."""
    leaves = [x if x is None else (x.double() if wide else x).detach().requires_grad_() for x in given]
    found = function(*leaves)
    sources = [x for x in leaves if x is not None]
    return [found.detach(), *torch.autograd.grad(found, sources, grad.to(found.dtype))]


def check(given, dtype):
    grad = random(len(given[0]), len(given[1]), seed=4).to(dtype)
    for actual, expected in zip(results(linear, given, grad), results(definition, given, grad, wide=True), strict=True):
        assert actual.shape == expected.shape and actual.dtype is dtype
        assert difference(actual, expected, floor=0.1) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [
        (1, 1, 1),
        (1, 64, 96),
        (7, 24, 40),
        (33, 96, 17),
        (64, 600, 64),
        (700, 70, 1100),
        (0, 8, 3),
        (3, 0, 5),
        (4, 8, 0),
    ],
    ids=str,
)
def test_it_is_the_product_with_what_is_added(rows, width, out, added, dtype):
    check(inputs(rows, width, out, dtype, *added), dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 140),
    width=st.integers(0, 140),
    out=st.integers(1, 140),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_shapes(rows, width, out, with_bias, with_residual, dtype):
    check(inputs(rows, width, out, dtype, with_bias, with_residual), dtype)


@pytest.mark.parametrize(("rows", "width", "out"), [(9, 2100, 9000), (9000, 2100, 9), (40, 9000, 2100)])
def test_products_that_are_computed_piece_by_piece(rows, width, out):
    check(inputs(rows, width, out, torch.float32, True, True), torch.float32)


def row_results(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, grad: Tensor) -> list[Tensor]:
    """Return what belongs to the rows: the output and the gradient of x."""
    return results(lambda x: linear(x, weight, bias, residual), (x,), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "out", "with_bias"), [(96, 50, False), (1100, 130, True), (77, 33, True), (1, 1, False)]
)
def test_the_bits_of_a_row_depend_on_it_alone(width, out, with_bias, dtype, exact_only):
    rows = 200
    x, weight, bias, residual = inputs(rows, width, out, dtype, with_bias, True)
    grad = random(rows, out, seed=4).to(dtype)
    whole = row_results(x, weight, bias, residual, grad)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for count in COUNTS:
                for first in (0, 7, rows - count):
                    part = slice(first, min(first + count, rows))
                    found = row_results(x[part], weight, bias, residual[part], grad[part])
                    assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True)), (threads, part)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [96, 101, 1000])
def test_a_weight_that_other_weights_drove_out_of_the_caches_gives_the_same_bits(out, dtype, exact_only):
    """Few rows read such a weight in either of two ways, by chance at first (`ops/native/far.h`)."""
    weight, others = random(out, 160, dtype=dtype), torch.ones(2**16, 192, dtype=dtype)  # of 24 MiB or more
    for rows in (1, 2, 3):
        x, there = random(rows, 160, dtype=dtype, seed=1), random(rows, 192, dtype=dtype)
        near = linear(x, weight)
        for _ in range(6):
            for _ in range(8):
                linear(there, others)
            assert torch.equal(linear(x, weight), near)
        assert torch.equal(
            linear(random(40, 160, dtype=dtype, seed=2).index_copy(0, torch.arange(rows), x), weight)[:rows], near
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_weights_gradient_do_not_depend_on_its_other_rows_or_the_threads(dtype, exact_only):
    given, grad = inputs(90, 70, 150, dtype), random(90, 150, seed=4).to(dtype)
    whole = results(linear, given, grad)[2]
    torch.set_num_threads(2)
    try:
        assert torch.equal(results(linear, given, grad)[2], whole)
    finally:
        torch.set_num_threads(1)
    for first, last in ((0, 1), (3, 40), (60, 150)):
        part = given[0], given[1][first:last], None, None
        assert torch.equal(results(linear, part, grad[:, first:last])[2], whole[first:last])


def test_a_residual_is_added_before_the_one_rounding():
    """256 + 1/2 has no bf16 of its own, but the difference to 256 has."""
    x, weight = torch.tensor([[256.0, 0.5]]).bfloat16(), torch.ones(1, 2).bfloat16()
    assert linear(x, weight, residual=torch.tensor([[-256.0]]).bfloat16()).item() == 0.5 or not exact_rows()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_dimensions_are_taken(dtype):
    x, weight, bias, residual = inputs(12, 40, 17, dtype, True, True)
    expected = definition(*(tensor.double() for tensor in (x, weight, bias, residual)))
    strided = [tensor.t().contiguous().t() for tensor in (x, weight)]
    assert difference(linear(*strided, bias, residual), expected) < DTYPES[dtype]
    wider = random(12, 81, dtype=dtype)
    wider[:, 1::2] = x
    assert difference(linear(wider[:, 1::2], weight, bias, residual), expected) < DTYPES[dtype]
    folded = linear(x.view(3, 4, 40), weight, bias, residual.view(3, 4, 17))
    assert difference(folded.view(12, 17), expected) < DTYPES[dtype]


def test_an_infinite_row_stays_in_its_place():
    """What pads the last words of a row or a tile is not its neighbour."""
    for width in (33, 64, 70):
        x, weight, *_ = inputs(20, width, 40, torch.bfloat16)
        x[7] = float("inf")
        assert linear(x, weight)[[i for i in range(20) if i != 7]].isfinite().all()


def test_it_is_declared_exact_where_its_kernel_is_used():
    (row,) = [row for row in status() if row.operator == "linear"]
    assert row.exact is (True if row.kernel == "native" else None)
    assert (exact_rows() > 0) == (row.kernel == "native")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_computed_by_the_reference(dtype):
    given = inputs(3, 8, 5, dtype, True, True)
    assert difference(linear(*given), definition(*(x.double() for x in given))) < (
        1e-12 if dtype is torch.float64 else 1e-2
    )


@pytest.mark.parametrize("shape", [(7, 5), (1, 6), (6,)])  # other shapes: test_promises.py
def test_a_residual_of_another_shape_is_refused(shape):
    with pytest.raises(ShapeError, match=r"residual \["):
        linear(torch.ones(7, 10), torch.ones(6, 10), residual=torch.ones(shape))
