"""Triton's kernels compute what their operators' references do, in any shape, with bits that depend on a row alone."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liaoyuan.ops import choice
from liaoyuan.ops.operator import outputs_and_gradients
from liaoyuan.ops.triton.launch import Tile
from tests.conftest import slow_if
from tests.ops.cases import boundaries_of, difference, random
from tests.ops.triton.conftest import CARD, DEVICE, WITH_TRITON, triton_kernel

FEW = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DIMS, WINDOWS = st.integers(2, 40), st.none() | st.integers(1, 80)
LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=4)


def place(*inputs):
    return tuple(x.to(DEVICE) if torch.is_tensor(x) else x for x in inputs)


def agree(operator, *inputs, tolerance=2e-5):
    """Compare the operator, forward and backward, with its reference in fp32."""
    sample = place(*inputs)
    expected = outputs_and_gradients(operator, operator.reference, sample)
    for a, b in zip(outputs_and_gradients(operator, operator.call, sample), expected, strict=True):
        assert a.shape == b.shape
        assert difference(a, b, floor=0.5) < tolerance


# The interpreter needs the longest for these.
SLOW = {("attention", torch.bfloat16), ("loss_head", torch.float32), ("sample_tokens", torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        slow_if((name, dtype) in SLOW, name, dtype, name=f"{name}-{short}")
        for name in WITH_TRITON
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    ],
)
def test_every_kernel_passes_its_self_test(name, dtype, use, monkeypatch):
    operator = use(name)
    if name in ("attention", "block_attention") and not CARD:  # the interpreter's time is that of the number of tiles
        for function in ("attention_tile", "attention_backward_tile"):
            monkeypatch.setattr(f"liaoyuan.ops.triton.{name}.{function}", lambda *_: Tile(128, 128))
    assert choice.self_test(operator, dataclasses.replace(triton_kernel(operator), dtypes=(dtype,)), DEVICE) is None


@FEW
@given(rows=st.integers(0, 40), width=st.integers(1, 70))
def test_norms(use, rows, width):
    x, residual, weight = random(rows, width), random(rows, width, seed=1), 1 + 0.1 * random(width, seed=2)
    agree(use("rms_norm"), x, weight, 1e-5)
    agree(use("add_rms_norm"), residual, x, weight, 1e-5)


@FEW
@given(rows=st.integers(0, 40), width=st.integers(1, 200))
def test_gated_activations(use, rows, width):
    x = 3 * random(rows, 2 * width)
    agree(use("swiglu"), x)
    agree(use("geglu"), x, False)
    agree(use("geglu"), x, True)
    agree(use("clamped_swiglu"), x, 2.0, 1.5)


@FEW
@given(
    rows=st.integers(1, 70), heads=st.integers(1, 3), groups=st.integers(1, 3), half=st.integers(1, 40),
    normed=st.booleans(),
)  # fmt: skip
def test_split_rotary(use, rows, heads, groups, half, normed):
    qkv, angle = random(rows, heads * (groups + 2) * 2 * half), 6 * random(rows, half, seed=1)
    norms = [1 + 0.1 * random(2 * half, seed=i) if normed else None for i in (2, 3)]
    agree(use("split_rotary"), qkv, angle.cos(), angle.sin(), heads, 2 * half, *norms, 1e-6)


@FEW
@given(
    rows=st.integers(0, 70), heads=st.integers(1, 3), own=st.integers(0, 40), half=st.integers(1, 20),
    value=st.integers(1, 40),
)  # fmt: skip
def test_latent_rotary(use, rows, heads, own, half, value):
    widths = (heads * (own + 2 * half), heads * (own + value), 2 * half)
    parts = [random(rows, width, seed=i) for i, width in enumerate(widths)]
    angle = 6 * random(rows, half, seed=4)
    agree(use("latent_rotary"), *parts, angle.cos(), angle.sin(), heads)


@FEW
@given(
    rows=st.integers(0, 90), width=st.integers(1, 40), columns=st.integers(1, 2500), first=st.integers(0, 100),
    more=st.integers(0, 100), moments=st.booleans(), keep=st.booleans(),
)  # fmt: skip
def test_loss_head(use, rows, width, columns, first, more, moments, keep):
    targets = torch.randint(first + columns + more, (rows,), generator=torch.Generator().manual_seed(2))
    hidden, weight = random(rows, width), 0.3 * random(columns, width, seed=1)
    agree(use("loss_head"), hidden, weight, targets, first, first + columns + more, moments, keep)


def test_the_gradients_of_a_vocabulary_in_slices_are_those_of_the_whole(use, monkeypatch):
    operator = use("loss_head")
    monkeypatch.setattr("liaoyuan.ops.triton.loss_head.SLICE", 70 * 64)
    agree(operator, random(40, 24), random(300, 24, seed=1), torch.arange(40) * 7, 0, 300, True, False)


@pytest.mark.parametrize("moments", [False, True])
def test_logits_of_some_rows_at_a_time_have_the_bits_of_all(use, moments, monkeypatch):
    inputs = place(random(40, 24), random(300, 24, seed=1), torch.arange(40) * 7, 0, 300, moments, False)
    whole = use("loss_head").call(*inputs)
    monkeypatch.setattr("liaoyuan.ops.triton.loss_head.ROW_SLICE", 7 * 300)
    for one, other in zip(use("loss_head").call(*inputs), whole, strict=True):
        assert torch.equal(one, other)


@FEW
@given(
    lengths=LENGTHS, key_heads=st.integers(1, 2), groups=st.integers(1, 3), dims=st.tuples(DIMS, DIMS),
    window=WINDOWS, with_sinks=st.booleans(),
)  # fmt: skip
def test_attention(use, lengths, key_heads, groups, dims, window, with_sinks):
    query = random(sum(lengths), key_heads * groups, dims[0])
    key, value = (random(sum(lengths), key_heads, dim, seed=i) for i, dim in enumerate(dims))
    sinks = random(key_heads * groups, seed=5) if with_sinks else None
    agree(use("attention"), query, key, value, boundaries_of(lengths), dims[0] ** -0.5, window, sinks)


def test_no_rows_are_no_work(use):
    query, key, value = use("split_rotary").call(
        *place(random(0, 64), random(0, 4), random(0, 4), 2, 8, None, None, 1e-6)
    )
    assert query.shape == (0, 4, 8) and key.shape == value.shape == (0, 2, 8)
    tables, starts, lengths = (torch.zeros(n, dtype=torch.int32) for n in ((1, 1), 2, 1))
    cache = random(1, 16, 2, 8)
    assert use("paged_attention").call(*place(random(0, 4, 8), cache, cache, tables, starts, lengths, 1.0)).numel() == 0
    use("write_cache").call(*place(random(0, 2, 8), random(0, 2, 8), cache, cache, torch.zeros(0, dtype=torch.long)))


def test_strided_inputs_are_taken(use):
    x, weight = random(32, 6).t(), random(64)[::2]
    agree(use("rms_norm"), x, weight, 1e-6)
    agree(use("swiglu"), x)
    agree(use("loss_head"), x, random(32, 40).t(), torch.arange(6), 0, 40, True, False)
    query, key, value = (random(2, 16, 8, seed=seed).transpose(0, 1) for seed in range(3))
    agree(use("attention"), query, key, value, boundaries_of([7, 9]), 0.3)


def test_the_bits_of_a_row_depend_on_it_alone(use):
    x, weight, targets = random(70, 40), random(1100, 40, seed=1), torch.arange(70) * 15
    whole = use("loss_head").call(*place(x, weight, targets, 0, 1100, True, False))
    normed = use("rms_norm").call(*place(x, weight[0], 1e-6))
    for rows in (1, 3, 66):
        part = use("loss_head").call(*place(x[:rows], weight, targets[:rows], 0, 1100, True, False))
        assert all(torch.equal(a, b[:rows]) for a, b in zip(part[:4], whole[:4], strict=True))
        assert torch.equal(use("rms_norm").call(*place(x[:rows], weight[0], 1e-6)), normed[:rows])


def test_a_target_outside_the_vocabulary_is_infinitely_unlikely(use):
    found = use("loss_head").call(*place(random(2, 8), random(5, 8), torch.tensor([4, 5]), 0, 5, False, False))[0]
    assert found[0].isfinite() and found[1] == float("-inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_document_has_the_same_bits_wherever_it_lies(use, dtype):
    lengths, attention = (70, 33, 5), use("attention").call
    inputs = [random(sum(lengths), heads, 16, dtype=dtype, seed=heads) for heads in (4, 2, 2)]
    packed = attention(*place(*inputs, boundaries_of(lengths), 0.2))[0].split(lengths)
    for part, *alone in zip(packed, *(x.split(lengths) for x in inputs), strict=True):
        assert torch.equal(part, attention(*place(*alone, boundaries_of([len(part)]), 0.2))[0])
    prefix = attention(*place(*(x[:40] for x in inputs), boundaries_of([40]), 0.2))[0]
    assert torch.equal(packed[0][:40], prefix)


@FEW
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 70), key_heads=st.integers(1, 2), groups=st.integers(1, 3),
    dims=st.tuples(DIMS, DIMS), seed=st.integers(0, 9),
)  # fmt: skip
def test_block_attention(use, queries, keys, key_heads, groups, dims, seed):
    query = random(queries, key_heads * groups, dims[0])
    key, value = (random(keys, key_heads, dim, seed=i) for i, dim in enumerate(dims))
    ends = torch.randint(0, keys + 1, (2, queries), generator=torch.Generator().manual_seed(seed))  # many are empty
    operator = use("block_attention")
    sample = place(query, key, value, *ends, dims[0] ** -0.5)
    expected = operator.reference(*sample)
    for a, b in zip(operator.call(*sample), expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()) and difference(a.nan_to_num(), b.nan_to_num(), floor=0.5) < 2e-5
    grads = place(random(*expected[0].shape, seed=3), random(*expected[1].shape, seed=4))
    arguments = (*grads, expected[1], *sample)
    found = torch.ops.liaoyuan.block_attention_backward(*arguments)
    for a, b in zip(found, operator.gradient.reference(*arguments), strict=True):
        assert difference(a, b, floor=0.5) < 2e-5


def pages_of(key, value, size, lengths):
    """Return caches of blocks of this size, in reverse order, that hold these sequences, and the tables."""
    blocks = [-(-length // size) for length in lengths]
    numbers = torch.arange(sum(blocks), dtype=torch.int32).flip(0).split(blocks)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    caches = [x.new_full((sum(blocks), size, *x.shape[1:]), torch.nan) for x in (key, value)]
    slots = []
    for row, (mine, length) in enumerate(zip(numbers, lengths, strict=True)):
        tables[row, : len(mine)] = mine
        place = torch.arange(length)
        slots.append(mine.long()[place // size] * size + place % size)
    return caches, tables, torch.cat(slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("split", [False, True])
def test_decoding_from_pages_gives_the_bits_of_attention_over_the_whole_text(use, dtype, split, monkeypatch):
    from triton import language as tl

    monkeypatch.setattr("liaoyuan.ops.triton.paged_attention.SPLIT_ELEMENTS", 2**24 if split else 0)
    lengths = (1100, 37) if CARD else (150, 37)
    if not CARD:  # parts so short that the interpreter soon has several
        for module in ("attention", "paged_attention"):
            monkeypatch.setattr(f"liaoyuan.ops.triton.{module}.PART", tl.constexpr(64))
    query, key, value = (random(sum(lengths), heads, 16, dtype=dtype, seed=heads) for heads in (3, 1, 1))
    caches, tables, slots = pages_of(key, value, 16, lengths)
    caches = place(*caches)  # what is written there is read below
    use("write_cache").call(*place(key, value), *caches, *place(slots))
    whole = use("attention").call(*place(query, key, value, boundaries_of(lengths), 0.2))[0]
    newest = torch.tensor([*range(lengths[0] - 40, lengths[0]), -1])  # a prefill in chunks, and a decode
    starts, counts = torch.tensor([0, 40, 41], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    found = use("paged_attention").call(*place(query[newest]), *caches, *place(tables, starts, counts, 0.2))
    assert torch.equal(found, whole[newest])


@FEW
@given(
    data=st.data(), key_heads=st.integers(1, 2), groups=st.integers(1, 3), size=st.integers(1, 20),
    window=WINDOWS, with_sinks=st.booleans(),
)  # fmt: skip
def test_paged_attention(use, data, key_heads, groups, size, window, with_sinks):
    lengths = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=3))
    queries = [data.draw(st.integers(0, length)) for length in lengths]
    key, value = (random(sum(lengths), key_heads, dim, seed=dim) for dim in (12, 9))
    sinks = random(key_heads * groups, seed=5) if with_sinks else None
    caches, tables, slots = pages_of(key, value, size, lengths)
    use("write_cache").call(*place(key, value, *caches, slots))
    query = random(sum(queries) + 1, key_heads * groups, 12)  # one row more than the sequences have
    arguments = (*caches, tables, boundaries_of(queries), torch.tensor(lengths, dtype=torch.int32), 0.3, window, sinks)
    caches[0].nan_to_num_(), caches[1].nan_to_num_()  # the reference multiplies what it masks
    agree(use("paged_attention"), query, *arguments)


def test_a_slot_or_a_page_outside_the_cache_is_not_followed(use):
    cache, key = torch.zeros(2, 4, 1, 8), random(3, 1, 8)
    for slots in ([8, -1, 3], [2**40, -(2**40), 3]):
        use("write_cache").call(*place(key, key, cache, cache.clone(), torch.tensor(slots)))
    starts, lengths = boundaries_of([1]), torch.tensor([5], dtype=torch.int32)
    for table in ([[0, 2]], [[0, -1]], [[0]]):
        pages = torch.tensor(table, dtype=torch.int32)
        found = use("paged_attention").call(*place(random(1, 1, 8), cache, cache, pages, starts, lengths, 1.0))
        assert found.isfinite().all()
