"""Blocks of attention, each query over its own range of keys: merged, they are the whole, forward and backward."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.ops import attention, block_attention, block_attention_backward, merge
from tests.ops.cases import boundaries_of, difference, random

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def by_hand(query, key, value, first, last, scale):
    """From the definition, in fp64."""
    groups = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("nhd,mhd->nhm", query.double(), k) * scale
    place = torch.arange(len(key))
    seen = (place >= first[:, None]) & (place < last[:, None])
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # a query without keys
    return torch.einsum("nhm,mhd->nhd", weights, v), scores.logsumexp(-1)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), keys=st.integers(1, 90), groups=st.integers(1, 4), dims=st.tuples(*[st.integers(1, 40)] * 2))
def test_any_range_is_attended_to(data, keys, groups, dims):
    ends = st.integers(0, keys)
    ranges = data.draw(st.lists(st.tuples(ends, ends), max_size=50))
    first, last = torch.tensor(ranges, dtype=torch.long).view(-1, 2).t()
    query = random(len(ranges), groups, dims[0])
    key, value = random(keys, 1, dims[0], seed=1), random(keys, 1, dims[1], seed=2)
    out, log_sum_exp = block_attention(query, key, value, first, last, 0.3)
    expected, wanted = by_hand(query, key, value, first, last, 0.3)
    assert out.shape == expected.shape and out.dtype is log_sum_exp.dtype is torch.float32
    assert difference(out, expected) < 1e-5
    empty = first >= last
    assert not out[empty].any() and (log_sum_exp[empty] == float("-inf")).all()
    assert difference(log_sum_exp[~empty], wanted[~empty]) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 100])
def test_blocks_merged_are_the_whole_and_so_are_their_gradients(window, dtype):
    lengths, cuts, scale = (150, 33, 17), (0, 40, 64, 151, 200), 0.2
    tokens = sum(lengths)
    query, key, value = (random(tokens, heads, dim, dtype=dtype, seed=seed).requires_grad_()
                         for seed, (heads, dim) in enumerate(((4, 32), (2, 32), (2, 48))))  # fmt: skip
    grad = random(tokens, 4, 48, dtype=dtype, seed=7)
    whole = attention(query, key, value, boundaries_of(lengths), scale, window)
    wanted = torch.autograd.grad(whole, (query, key, value), grad)
    query, key, value = (x.detach() for x in (query, key, value))
    place = torch.arange(tokens)
    begin = boundaries_of(lengths).long()[torch.searchsorted(boundaries_of(lengths)[1:].long(), place, right=True)]
    begin = begin if window is None else begin.maximum(place - window + 1)
    blocks = [(slice(a, b), ((begin - a).clamp(0, b - a), (place + 1 - a).clamp(0, b - a))) for a, b in pairwise(cuts)]
    out, log_sum_exp = torch.zeros(tokens, 4, 48), torch.full((tokens, 4), float("-inf"))
    for rows, ranges in blocks:
        part = block_attention(query, key[rows], value[rows], *ranges, scale)
        out, log_sum_exp = merge(out, log_sum_exp, *part)
    assert difference(out, whole) < TOLERANCE[dtype]
    delta = (grad.float() * out).sum(-1)
    sums = [torch.zeros(x.shape) for x in (query, key, value)]
    for rows, ranges in blocks:
        softmax = (grad.float(), delta, log_sum_exp)
        parts = block_attention_backward(*softmax, query, key[rows], value[rows], *ranges, scale)
        for total, part, where in zip(sums, parts, (slice(None), rows, rows), strict=True):
            total[where] += part
    for a, b in zip(sums, wanted, strict=True):
        assert difference(a, b) < TOLERANCE[dtype]


def test_a_query_has_the_same_bits_whatever_is_beside_it_and_with_two_threads():
    query, key, value = random(300, 6, 32), random(700, 2, 32, seed=1), random(700, 2, 32, seed=2)
    first = torch.arange(300) % 90
    last = first + torch.arange(300) * 2 + 1
    whole = block_attention(query, key, value, first, last, 0.2)
    for rows in (slice(7, 8), slice(31, 190), torch.randperm(300, generator=torch.Generator().manual_seed(1))):
        part = block_attention(query[rows], key, value, first[rows], last[rows], 0.2)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))

    def gradients():
        grad = random(300, 6, 32, seed=5)
        delta = (grad * whole[0]).sum(-1)
        return block_attention_backward(grad, delta, whole[1], query, key, value, first, last, 0.2)

    one = gradients()
    torch.set_num_threads(2)
    try:
        two = [*block_attention(query, key, value, first, last, 0.2), *gradients()]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(two, (*whole, *one), strict=True))


def test_strided_inputs_are_taken():
    query, key, value = (random(2, rows, 8, seed=rows).transpose(0, 1) for rows in (9, 12, 12))
    ranges = torch.tensor([[0, 5]] * 9).t()
    out, _ = block_attention(query, key, value, *ranges, 0.4)
    assert difference(out, by_hand(query, key, value, *ranges, 0.4)[0]) < 1e-5


def test_ranges_outside_the_block_are_refused_with_their_sizes():
    query, key = random(3, 2, 8), random(5, 1, 8)
    first, last = torch.zeros(3, dtype=torch.long), torch.tensor([1, 6, 2])
    with pytest.raises(RuntimeError, match="query 1 sees keys 0 to 6 of 5"):
        block_attention(query, key, key, first, last, 1.0)
    with pytest.raises(ValueError, match=r"first \[2\] does not fit query \[3, 2, 8\]"):
        block_attention(query, key, key, first[:2], last, 1.0)
    with pytest.raises(ValueError, match=r"key \[5, 1, 7\] does not fit query \[3, 2, 8\]: D is 7 and 8"):
        block_attention(query, key[..., :7], key, first, last.clamp_max(5), 1.0)


SCRIPT = """
import resource, torch
from liaoyuan.ops import block_attention
query, key = torch.randn(8192, 8, 32), torch.randn(8192, 2, 32)
last = torch.arange(8192) + 1
first = (last - 64).clamp_min(0)
block_attention(query[:8], key[:8], key[:8], first[:8], last[:8], 0.2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
block_attention(query.requires_grad_(), key, key, first, last, 0.2)[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_scores_are_never_held():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    assert int(found.stdout) < 200  # MiB; the scores alone are 2048
