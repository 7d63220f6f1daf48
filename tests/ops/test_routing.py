"""The choice of experts against its definition, token by token in fp64; rows to their experts and back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from liaoyuan.ops import combine_rows, permute_rows, route, status
from tests.ops.cases import difference, random

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def native_only():
    if any(s.kernel != "native" for s in status() if s.operator in ("route", "permute_rows", "combine_rows")):
        pytest.skip("a promise of the kernels")


def route_by_hand(logits: Tensor, kept, scoring, bias, groups, kept_groups, group_best, normalise, scale):
    """Choose token by token, in fp64, from the definition."""
    weights, chosen = [], []
    for row in logits.double():
        scores = row.softmax(0) if scoring == "softmax" else row.sigmoid()
        values = (scores.detach() + (0 if bias is None else bias.double())).tolist()
        size = len(values) // groups
        worth = [sum(sorted(values[g * size : (g + 1) * size])[::-1][:group_best]) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: -worth[g])[:kept_groups]
        allowed = [e for e in range(len(values)) if e // size in best]
        own = sorted(allowed, key=lambda e: -values[e])[:kept]
        picked = scores[own]
        weights.append(scale * picked / (picked.sum() if normalise else 1))
        chosen.append(own)
    return torch.stack(weights), torch.tensor(chosen)


ROUTES = {
    "mixtral": (8, (2, "softmax", False, 1, 1, 1, True, 1.0)),
    "one expert": (1, (1, "softmax", False, 1, 1, 1, True, 1.0)),
    "all experts": (5, (5, "softmax", False, 1, 1, 1, False, 1.0)),
    "many experts": (131, (8, "softmax", False, 1, 1, 1, False, 1.0)),
    "deepseek v2": (60, (6, "softmax", False, 6, 3, 1, False, 16.0)),
    "deepseek v3": (64, (8, "sigmoid", True, 8, 4, 2, True, 2.5)),
    "groups smaller than what is summed": (6, (2, "sigmoid", True, 6, 2, 2, True, 1.0)),
}


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("name", ROUTES)
def test_experts_and_weights_are_those_of_the_definition(name, rows):
    experts, (kept, scoring, biased, *options) = ROUTES[name]
    logits = (2 * random(rows, experts)).requires_grad_()
    bias = 0.2 * random(experts, seed=1) if biased else None
    weights, chosen = route(logits, kept, scoring, bias, *options)
    wide = logits.detach().double().requires_grad_()
    expected, experts_expected = route_by_hand(wide, kept, scoring, bias, *options)
    assert torch.equal(chosen, experts_expected) and weights.dtype is torch.float32
    assert difference(weights, expected) < 1e-5
    grad = random(rows, kept, seed=2)
    found, wanted = torch.autograd.grad(weights, logits, grad)[0], torch.autograd.grad(expected, wide, grad.double())[0]
    assert difference(found, wanted, floor=1e-2) < 1e-5


def test_of_equal_experts_the_first_are_chosen():
    for rows in (1, 3):
        assert route(torch.zeros(rows, 40), 3)[1].tolist() == [[0, 1, 2]] * rows
        assert route(torch.zeros(rows, 40).double(), 3)[1].tolist() == [[0, 1, 2]] * rows


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_kernel_and_reference_choose_alike(data):
    groups, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    kept_groups = data.draw(st.integers(1, groups))
    kept = data.draw(st.integers(1, size * kept_groups))
    options = (data.draw(st.sampled_from(["softmax", "sigmoid"])), None, groups, kept_groups)
    options += (data.draw(st.integers(1, 3)), data.draw(st.booleans()), 2.0)
    logits = random(data.draw(st.integers(0, 9)), groups * size, seed=data.draw(st.integers(0, 9)))
    (weights, chosen), (expected, expected_chosen) = (
        route(logits, kept, *options),
        route(logits.double(), kept, *options),
    )
    assert torch.equal(chosen, expected_chosen) and difference(weights, expected) < 1e-5


def test_a_tokens_weights_do_not_depend_on_the_others_or_the_threads(native_only):
    logits, grad = random(100, 50).requires_grad_(), random(100, 6, seed=1)
    weights, chosen = route(logits, 6)
    back = torch.autograd.grad(weights, logits, grad)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again, _ = route(logits, 6)
        assert torch.equal(again, weights) and torch.equal(torch.autograd.grad(again, logits, grad)[0], back)
    finally:
        torch.set_num_threads(threads)
    for first, last in ((0, 1), (31, 33), (99, 100)):
        part = logits.detach()[first:last].requires_grad_()
        own, own_chosen = route(part, 6)
        assert torch.equal(own, weights[first:last]) and torch.equal(own_chosen, chosen[first:last])
        assert torch.equal(torch.autograd.grad(own, part, grad[first:last])[0], back[first:last])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_even_wild_logits_name_experts_that_exist(value):
    logits = random(4, 16)
    logits[1] = value
    logits[2, 5] = value
    for scoring in ("softmax", "sigmoid"):
        chosen = route(logits, 5, scoring, None, 4, 2, 2)[1]
        assert chosen.min() >= 0 and chosen.max() < 16
        assert all(len(set(row)) == 5 for row in chosen.tolist())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((9,), "9 of 8 experts cannot be chosen"),
        ((2, "tanh"), "not tanh"),
        ((2, "sigmoid", torch.zeros(7)), r"bias \[7\] does not fit logits \[3, 8\]"),
        ((2, "softmax", None, 3), "of 3 groups cannot be chosen.* of 8"),
        ((5, "softmax", None, 4, 2), "5 of 8 experts cannot be chosen from 2 of 4 groups"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        route(random(3, 8), *arguments)


def choices(tokens: int, per_token: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(tokens, experts, generator=generator).topk(per_token, -1).indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "per_token", "experts", "width"), [(1, 1, 1, 1), (50, 3, 7, 37), (0, 2, 4, 8)])
def test_rows_go_to_their_experts_sorted_by_token(tokens, per_token, experts, width, dtype):
    x, chosen = random(tokens, width, dtype=dtype).requires_grad_(), choices(tokens, per_token, experts)
    rows, order, sizes = permute_rows(x, chosen, experts)
    pairs = sorted((int(e), n) for n in range(tokens) for e in chosen[n])
    expected = x[torch.tensor([n for _, n in pairs], dtype=torch.long)]
    assert torch.equal(rows, expected)
    assert sizes.tolist() == [sum(e == expert for e, _ in pairs) for expert in range(experts)]
    assert torch.equal(chosen.flatten()[order], torch.tensor([e for e, _ in pairs], dtype=torch.long))
    grad = random(len(rows), width, seed=1).to(dtype)
    found = torch.autograd.grad(rows, x, grad)[0]
    wanted = torch.zeros(tokens, width).double().index_add(0, order // per_token, grad.double())
    assert difference(found, wanted) < TOLERANCE.get(dtype, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "per_token", "width"), [(1, 1, 1), (45, 3, 37), (0, 2, 8)])
def test_results_come_back_as_the_weighted_sum(tokens, per_token, width, dtype):
    rows, order = random(tokens * per_token, width, dtype=dtype), torch.randperm(tokens * per_token)
    weights = torch.rand(tokens, per_token).to(torch.promote_types(dtype, torch.float32))
    grad = random(tokens, width, seed=1).to(dtype)

    def by_hand(rows, order, weights):
        weighted = rows * weights.flatten()[order, None]
        return torch.zeros(tokens, width).double().index_add(0, order // per_token, weighted)

    given = [rows.requires_grad_(), weights.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, expected = combine_rows(given[0], order, given[1]), by_hand(exact[0], order, exact[1])
    found, wanted = torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, exact, grad.double())
    for a, b in zip((out, *found), (expected, *wanted), strict=True):
        assert a.shape == b.shape and difference(a, b) < TOLERANCE.get(dtype, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_sum_does_not_depend_on_the_tokens_beside_it(dtype):
    x, chosen, weights = random(60, 40, dtype=dtype), choices(60, 4, 9), torch.rand(60, 4)

    def there_and_back(first: int, last: int) -> Tensor:
        rows, order, _ = permute_rows(x[first:last], chosen[first:last], 9)
        rows = rows * (1 + order % 4)[:, None]  # each choice gives another result
        return combine_rows(rows, order, weights[first:last])

    whole = there_and_back(0, 60)
    for first, last in ((0, 1), (7, 40), (59, 60)):
        assert torch.equal(there_and_back(first, last), whole[first:last])


def test_there_and_back_with_weights_that_add_up_to_one_changes_nothing():
    x, chosen = random(30, 16), choices(30, 4, 8)
    rows, order, _ = permute_rows(x, chosen, 8)
    assert difference(combine_rows(rows, order, torch.full((30, 4), 0.25)), x) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_do_not_fit_are_refused(dtype):
    x, chosen = random(3, 4, dtype=dtype), torch.tensor([[0], [1], [2]])
    with pytest.raises(RuntimeError, match="expert"):
        permute_rows(x, chosen, 2)
    with pytest.raises(ValueError, match=r"chosen \[2, 1\] does not fit x \[3, 4\]"):
        permute_rows(x, chosen[:2], 3)
    with pytest.raises(ValueError, match=r"weights \[2, 1\]"):
        combine_rows(x, torch.arange(3), torch.ones(2, 1))


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_an_order_that_is_no_permutation_is_refused(order, native_only):
    with pytest.raises(RuntimeError, match="no permutation"):
        combine_rows(random(3, 4), torch.tensor(order), torch.ones(3, 1))


def test_weights_vanish_together_without_a_nan():
    weights, _ = route(torch.full((2, 4), -200.0), 2, "sigmoid")
    assert all(map(math.isfinite, weights.flatten().tolist()))


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
