"""Packed attention: every document as if it were alone, forward and backward, in any split of the batch."""

import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from liaoyuan.ops import attention
from tests.ops.cases import RAGGED, attention_by_hand, boundaries_of, difference, random

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(lengths, query_heads, key_heads, dim, dtype):
    tokens = sum(lengths)
    return [
        random(tokens, heads, dim, dtype=dtype, seed=seed).requires_grad_()
        for seed, heads in enumerate((query_heads, key_heads, key_heads))
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(("query_heads", "key_heads", "dim"), [(2, 2, 64), (6, 2, 24), (4, 1, 16), (1, 1, 128)])
def test_each_document_is_attended_alone(lengths, query_heads, key_heads, dim, dtype):
    q, k, v = inputs(lengths, query_heads, key_heads, dim, dtype)
    grad = random(*q.shape, dtype=dtype, seed=9)
    out = attention(q, k, v, boundaries_of(lengths), dim**-0.5)
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = attention_by_hand(*exact, lengths, dim**-0.5)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    assert difference(out, expected) < TOLERANCE[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert difference(a, b, floor=0.5) < TOLERANCE[dtype]  # a document of one token has no score gradient


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [1, 32, 33, 700])
@pytest.mark.parametrize(
    ("query_heads", "key_heads", "dim", "value_dim"), [(4, 2, 24, 16), (3, 1, 64, 64), (2, 2, 16, 40)]
)
def test_windows_sinks_and_values_of_another_width_are_the_definitions(
    query_heads, key_heads, dim, value_dim, window, dtype
):
    lengths = (3, 0, 40, 530, 1)
    q, k, v = (random(sum(lengths), heads, width, dtype=dtype, seed=seed).requires_grad_() for seed, (heads, width) in
               enumerate(((query_heads, dim), (key_heads, dim), (key_heads, value_dim))))  # fmt: skip
    sinks = random(query_heads, dtype=dtype, seed=4).requires_grad_()
    grad = random(len(q), query_heads, value_dim, dtype=dtype, seed=9)
    out = attention(q, k, v, boundaries_of(lengths), dim**-0.5, window, sinks)
    found = torch.autograd.grad(out, (q, k, v, sinks), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    expected = attention_by_hand(*exact[:3], lengths, dim**-0.5, window, exact[3])
    wanted = torch.autograd.grad(expected, exact, grad.double())
    assert difference(out, expected) < TOLERANCE[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert difference(a, b, floor=0.5) < TOLERANCE[dtype]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    groups=st.integers(1, 5),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    window=st.none() | st.integers(0, 80),
    with_sinks=st.booleans(),
)
def test_any_shape_is_attended_to(lengths, groups, dims, window, with_sinks):
    tokens, dim = sum(lengths), dims[0]
    q, k, v = random(tokens, groups, dim), random(tokens, 1, dim, seed=1), random(tokens, 1, dims[1], seed=2)
    sinks = random(groups, seed=3) if with_sinks else None
    out = attention(q, k, v, boundaries_of(lengths), dim**-0.5, window, sinks)
    wide = [x if x is None else x.double() for x in (q, k, v, sinks)]
    expected = attention_by_hand(*wide[:3], lengths, dim**-0.5, window, wide[3])
    assert out.shape == expected.shape
    assert difference(out, expected) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_a_window_hides_changes_no_bit(dtype):
    lengths, window, seen = (20, 600), 50, 40
    q, k, v = (x.detach() for x in inputs(lengths, 6, 2, 32, dtype))
    sinks = random(6, seed=5)
    out = attention(q, k, v, boundaries_of(lengths), 0.2, window, sinks)
    other_k, other_v = k.clone(), v.clone()
    hidden = slice(0, sum(lengths) - seen - window + 1)
    other_k[hidden], other_v[hidden] = 7 * k[hidden] + 1, -v[hidden]
    again = attention(q, other_k, other_v, boundaries_of(lengths), 0.2, window, sinks)
    assert torch.equal(out[-seen:], again[-seen:])
    assert torch.equal(out[20:], attention(q[20:], k[20:], v[20:], boundaries_of([600]), 0.2, window, sinks))
    assert torch.equal(out[20:93], attention(q[20:93], k[20:93], v[20:93], boundaries_of([73]), 0.2, window, sinks))
    whole = attention(q, k, v, boundaries_of(lengths), 0.2)
    for wider in (0, 600, 10**15):
        assert torch.equal(whole, attention(q, k, v, boundaries_of(lengths), 0.2, wider))


def test_the_cost_falls_with_the_window():
    q, k, v = inputs((3072,), 2, 1, 64, torch.bfloat16)

    def seconds(window):
        times = []
        for _ in range(3):
            start = time.thread_time()
            out = attention(q, k, v, boundaries_of([3072]), 0.125, window)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            times.append(time.thread_time() - start)
        return min(times)

    seconds(64)
    assert seconds(64) < 0.4 * seconds(None)  # a twentieth of the pairs


def test_the_flops_of_a_window_are_those_of_its_pairs():
    lengths, window = (30, 0, 7, 1), 5
    q, k, v = inputs(lengths, 4, 2, 16, torch.float32)
    v = v[..., :8]
    pairs = 4 * sum(min(n + 1, window) for length in lengths for n in range(length))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, boundaries_of(lengths), 0.25, window).sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (16 + 8) + 2 * pairs * (3 * 16 + 2 * 8)


def test_a_compiled_window_with_sinks_equals_the_eager_one():
    def loss(q, k, v, sinks):
        return attention(q, k, v, boundaries_of([3, 9]), 0.3, 4, sinks).square().sum()

    given = [*inputs((3, 9), 4, 2, 16, torch.float32), random(4, seed=7).requires_grad_()]
    eager = torch.autograd.grad(loss(*given), given)
    traced = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*given), given)
    for a, b in zip(eager, traced, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_document_has_the_same_bits_wherever_it_lies(dtype):
    lengths = (70, 33, 5)
    q, k, v = (x.detach() for x in inputs(lengths, 4, 2, 32, dtype))
    packed = attention(q, k, v, boundaries_of(lengths), 0.2)
    for part, alone in zip(
        packed.split(lengths), zip(*(x.split(lengths) for x in (q, k, v)), strict=True), strict=True
    ):
        assert torch.equal(part, attention(*alone, boundaries_of([len(part)]), 0.2))
    prefix = attention(q[:40], k[:40], v[:40], boundaries_of([40]), 0.2)
    assert torch.equal(packed[:40], prefix)  # a later token changes no bit of an earlier one


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_long_document_is_cut_into_parts_whose_gradients_add_up(dtype, window):
    lengths = (5, 300, 40, 170)  # 19200 and 10880 rows of a key head: parts of 2048 or more
    q, k, v = inputs(lengths, 128, 2, 8, dtype)
    grad = random(*q.shape, dtype=dtype, seed=9)

    def gradients(begin, end, lengths):
        ours = [x.detach()[begin:end].requires_grad_() for x in (q, k, v)]
        out = attention(*ours, boundaries_of(lengths), 0.35, window)
        return torch.autograd.grad(out, ours, grad[begin:end])

    found = gradients(0, sum(lengths), lengths)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(attention_by_hand(*exact, lengths, 0.35, window), exact, grad.double())
    for a, b in zip(found, wanted, strict=True):
        assert difference(a, b, floor=0.5) < TOLERANCE[dtype]
    for whole, alone in zip(found, gradients(5, 305, (300,)), strict=True):
        assert torch.equal(whole[5:305], alone)
    torch.set_num_threads(2)
    try:
        again = gradients(0, sum(lengths), lengths)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


FEW_BYTES = """
import resource, torch
from pathlib import Path
from liaoyuan.ops import attention

def gradients(lengths):
    q, k, v = (torch.randn(sum(lengths), heads, 32).bfloat16().requires_grad_() for heads in (4, 1, 1))
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = attention(q, k, v, boundaries, 0.2, 64)
    return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

gradients([1024])
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 2**29, resource.RLIM_INFINITY))
gradients([200_000, *[1024] * 50])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the size of a process")
def test_documents_that_are_cut_ask_for_memory_by_their_own_length():
    """Beside a long document, many that are long enough to be cut: in 1.5 GiB, of which inputs and results take 0.5."""
    found = subprocess.run([sys.executable, "-c", FEW_BYTES], env=os.environ, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-1000:]


def test_results_are_the_same_twice_and_with_two_threads():
    lengths = (90, 3, 64, 200)
    q, k, v = inputs(lengths, 4, 2, 32, torch.bfloat16)
    sinks = random(4, dtype=torch.bfloat16, seed=3).requires_grad_()

    def run():
        out = attention(q, k, v, boundaries_of(lengths), 0.2, 70, sinks)
        return [out, *torch.autograd.grad(out, (q, k, v, sinks), torch.ones_like(out))]

    first, second = run(), run()
    torch.set_num_threads(2)
    try:
        third = run()
    finally:
        torch.set_num_threads(1)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_strided_inputs_and_other_dtypes_are_taken():
    lengths = (7, 9)
    q, k, v = (random(2, 16, 8, seed=seed).transpose(0, 1) for seed in range(3))
    expected = attention_by_hand(q.double(), k.double(), v.double(), lengths, 0.3)
    assert difference(attention(q, k, v, boundaries_of(lengths), 0.3), expected) < 1e-5
    wide = attention(q.double(), k.double(), v.double(), boundaries_of(lengths), 0.3)
    assert wide.dtype is torch.float64
    assert difference(wide, expected) < 1e-12


def test_wrong_boundaries_are_refused():
    q, k, v = (random(8, 1, 16) for _ in range(3))
    for wrong in ([0, 9], [0, 5, 3, 8], [1, 8]):
        with pytest.raises(RuntimeError, match="boundaries"):
            attention(q, k, v, torch.tensor(wrong, dtype=torch.int32), 1.0)


def test_wrong_shapes_are_refused_with_their_sizes():
    q, k, v, ends = random(8, 4, 16), random(8, 2, 16), random(8, 2, 16), boundaries_of([8])
    with pytest.raises(ValueError, match=r"query \[8, 4, 16\] and key \[8, 3, 16\] do not fit: Hq, 4, is no multiple"):
        attention(q, random(8, 3, 16), random(8, 3, 16), ends, 1.0)
    with pytest.raises(ValueError, match=r"value \[7, 2, 16\] does not fit query \[8, 4, 16\]: N is 7 and 8"):
        attention(q, k, v[:7], ends, 1.0)
    with pytest.raises(ValueError, match=r"sinks \[3\] does not fit query \[8, 4, 16\]: Hq is 3 and 4"):
        attention(q, k, v, ends, 1.0, None, random(3))
    with pytest.raises((RuntimeError, ValueError), match="a window of -1 tokens"):
        attention(q, k, v, ends, 1.0, -1)


def test_large_scores_stay_finite():
    q, k, v = (random(40, 1, 16, seed=seed) * 100 for seed in range(3))
    out = attention(q, k, v, boundaries_of([40]), 1.0)
    assert difference(out, attention_by_hand(q.double(), k.double(), v.double(), [40], 1.0)) < 1e-3
