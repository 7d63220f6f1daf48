"""Packed attention: every document as if it were alone, forward and backward, in any split of the batch."""

import pytest
import torch

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


def test_results_are_the_same_twice_and_with_two_threads():
    lengths = (90, 3, 64, 200)
    q, k, v = inputs(lengths, 4, 2, 32, torch.bfloat16)

    def run():
        out = attention(q, k, v, boundaries_of(lengths), 0.2)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

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


def test_large_scores_stay_finite():
    q, k, v = (random(40, 1, 16, seed=seed) * 100 for seed in range(3))
    out = attention(q, k, v, boundaries_of([40]), 1.0)
    assert difference(out, attention_by_hand(q.double(), k.double(), v.double(), [40], 1.0)) < 1e-3
