"""Routing on accelerators: the reference's choice and weights, and the way of rows to experts and back."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.cases import random
from tests.ops.triton.test_kernels import agree, place

FEW = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@FEW
@given(
    data=st.data(), rows=st.integers(0, 40), groups=st.integers(1, 5), size=st.integers(1, 9),
    scoring=st.sampled_from(["softmax", "sigmoid"]), normalise=st.booleans(), with_bias=st.booleans(),
)  # fmt: skip
def test_route(use, data, rows, groups, size, scoring, normalise, with_bias):
    kept_groups, group_best = data.draw(st.integers(1, groups)), data.draw(st.integers(1, 3))
    kept = data.draw(st.integers(1, kept_groups * size))
    logits = 2 * random(rows, groups * size)
    bias = 0.3 * random(groups * size, seed=1) if with_bias else None
    options = (kept, scoring, groups, kept_groups, group_best, normalise, 2.5)
    operator = use("route")
    agree(operator, logits, bias, *options)
    chosen = operator.call(*place(logits, bias, *options))[1]
    assert torch.equal(chosen.cpu(), operator.reference(logits, bias, *options)[1])


def test_of_equal_experts_the_first_is_chosen(use):
    options = (3, "sigmoid", 2, 1, 1, True, 1.0)
    chosen = use("route").call(*place(torch.zeros(2, 8), None, *options))[1]
    assert chosen.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_logits_that_are_no_numbers_choose_experts_that_exist(use):
    logits = torch.tensor([[torch.nan, 1.0, 2.0], [-torch.inf, -torch.inf, -torch.inf]])
    chosen = use("route").call(*place(logits, None, 2, "softmax", 1, 1, 1, True, 1.0))[1]
    assert ((chosen >= 0) & (chosen < 3)).all()


@FEW
@given(tokens=st.integers(0, 30), per_token=st.integers(1, 4), width=st.integers(1, 70), extra=st.integers(0, 5))
def test_rows_go_to_experts_and_back(use, tokens, per_token, width, extra):
    generator = torch.Generator().manual_seed(tokens)
    count = per_token + extra
    chosen = torch.rand(tokens, count, generator=generator).topk(per_token, -1).indices
    x, weights = random(tokens, width), torch.rand(tokens, per_token, generator=generator)
    permute, combine = use("permute_rows"), use("combine_rows")
    agree(permute, x, chosen, count)
    rows, order, sizes = permute.call(*place(x, chosen, count))
    for found, expected in zip((rows, order, sizes), permute.reference(x, chosen, count), strict=True):
        assert torch.equal(found.cpu(), expected)
    agree(combine, rows, order, weights)


def test_rows_wider_than_a_program_takes_at_a_time_and_strided_ones(use):
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1]])
    agree(use("permute_rows"), random(2500, 3).t(), chosen, 3)
    order = torch.tensor([4, 1, 0, 5, 3, 2])
    agree(use("combine_rows"), random(2500, 6).t(), order, random(2, 3).t())


def test_one_program_takes_many_rows_where_a_launch_has_few(use, monkeypatch):
    for module in ("route", "permutation"):
        monkeypatch.setattr(f"liaoyuan.ops.triton.{module}.programs", lambda parts: min(parts, 2))
    chosen = torch.arange(21).view(7, 3) % 5
    agree(use("permute_rows"), random(7, 20), chosen, 5)
    agree(use("combine_rows"), random(21, 20), torch.randperm(21), random(7, 3))
    agree(use("route"), random(90, 40), None, 3, "softmax", 1, 1, 1, True, 1.0)
