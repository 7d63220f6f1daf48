"""What holds for a row wherever it stands: how its elements are rounded, and that its bits are its own."""

import pytest
import torch
from torch import Tensor

from liaoyuan.ops import add_rms_norm, combine_rows, permute_rows, rms_norm, route
from tests.ops.cases import random

DTYPES = (torch.float32, torch.bfloat16)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


def test_every_number_is_rounded_as_torch_rounds_it():
    """All bf16 numbers, denormal ones too, added to others of their size and to their neighbours' halves."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for other in (every.flip(0), every[torch.randperm(2**16, generator=generator)], every.roll(1), every / 2):
        total, _ = add_rms_norm(every.view(64, -1), other.view(64, -1), torch.ones(1024, dtype=torch.bfloat16), 1e-6)
        expected = (every + other).view(64, -1)
        is_number = ~expected.isnan()
        assert torch.equal(total.isnan(), ~is_number)
        assert torch.equal(bits(total)[is_number], bits(expected)[is_number])


def test_a_norm_keeps_denormal_numbers():
    x, weight = (torch.full(shape, value).bfloat16() for shape, value in (((2, 70), 1e-38), ((70,), 0.1)))
    out = rms_norm(x, weight, 1.0)  # divided by one: what is left is the product with the weight
    expected = x.float() * weight.float()
    assert (expected > 0).all() and torch.equal(out, expected.bfloat16())


def gradients(x: Tensor, residual: Tensor, weight: Tensor, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
    outputs = add_rms_norm(leaves[1], leaves[0], weight, 1e-6)
    alone = rms_norm(leaves[0], weight, 1e-6)
    found = torch.autograd.grad((*outputs, alone), leaves, (*grads, grads[1]))
    return [*(out.detach() for out in outputs), alone.detach(), *found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 31, 100, 320])
def test_a_norms_bits_do_not_depend_on_the_rows_beside_it(width, dtype):
    x, residual, *grads = (random(70, width, dtype=dtype, seed=i) for i in range(4))
    weight = random(width, dtype=dtype, seed=5)
    whole = gradients(x, residual, weight, tuple(grads))
    for first, last in ((0, 1), (3, 8), (1, 70), (69, 70)):
        part = gradients(x[first:last], residual[first:last], weight, tuple(g[first:last] for g in grads))
        assert all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit_of_a_norm(dtype):
    x, grad = random(300, 500, dtype=dtype).requires_grad_(), random(300, 500, dtype=dtype, seed=1)
    weight = random(500, dtype=dtype, seed=2).requires_grad_()

    def both() -> list[Tensor]:
        out = rms_norm(x, weight, 1e-6)
        return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]

    once, threads = both(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(once, both(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_strided_row_is_normed_as_its_copy():
    x, weight = random(40, 9, 64, dtype=torch.bfloat16)[:, 2], random(64, dtype=torch.bfloat16, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 1024), (torch.float32, 528)])
def test_rows_of_experts_larger_than_the_caches_are_those_of_small_ones(dtype, width):
    """So many go past the caches; a part of them does not."""
    tokens, per_token = 2_200, 8
    x, weights = random(tokens, width, dtype=dtype), random(tokens, per_token, seed=1)
    chosen = torch.rand(tokens, 16, generator=torch.Generator().manual_seed(2)).topk(per_token, -1).indices
    rows, order, _ = permute_rows(x, chosen, 16)
    assert rows.nbytes > 2**25 and torch.equal(rows, x[order // per_token])
    grad = random(tokens, width, dtype=dtype, seed=3)

    def back(first: int, last: int) -> tuple[Tensor, ...]:
        here = (order >= first * per_token) & (order < last * per_token)
        own = rows[here].requires_grad_()
        factors = weights[first:last].clone().requires_grad_()
        out = combine_rows(own, order[here] - first * per_token, factors)
        return here, out, *torch.autograd.grad(out, (own, factors), grad[first:last])

    _, out, grad_rows, grad_weights = back(0, tokens)
    for first, last in ((0, 3), (900, 1_000), (tokens - 1, tokens)):
        here, part, part_rows, part_weights = back(first, last)
        assert torch.equal(part, out[first:last]) and torch.equal(part_weights, grad_weights[first:last])
        assert torch.equal(part_rows, grad_rows[here])


@pytest.mark.parametrize("kept", [1, 2, 3, 8, 9, 20, 40])
def test_experts_that_are_alike_are_chosen_in_their_order(kept):
    """Scores of few values, so that most are equal; more than eight experts are found in several rounds."""
    scores = torch.randint(3, (37, 40), generator=torch.Generator().manual_seed(kept)).float()
    bias = torch.randint(2, (40,), generator=torch.Generator().manual_seed(1)).float()
    for scoring in ("softmax", "sigmoid"):
        chosen = route(scores, kept, scoring, bias)[1]
        for row, own in zip(scores, chosen, strict=True):
            values = (row.softmax(0) if scoring == "softmax" else row.sigmoid()) + bias
            assert own.tolist() == sorted(range(40), key=lambda e: (-values[e].item(), e))[:kept]
