"""Sampling on accelerators: the reference's tokens, whatever the settings, and bits that depend on a row alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liaoyuan.ops import log_probability
from liaoyuan.ops.sampling import packed_mask, sampling_settings
from tests.ops.cases import random
from tests.ops.triton.test_kernels import place

FEW = settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def draw(use, *inputs):
    """Return what the kernel gives and what the reference does, one tuple each."""
    operator = use("sample_tokens")
    return [x.cpu() for x in operator.call(*place(*inputs))], operator.reference(*inputs)


def same(found, expected):
    assert found[0].tolist() == expected[0].tolist()
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)


@FEW
@given(rows=st.integers(0, 6), vocabulary=st.integers(1, 300), seed=st.integers(0, 99))
def test_tokens_and_log_probabilities_are_the_reference_s(use, rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)

    def one_of(*values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    chosen = sampling_settings(
        rows, temperature=one_of(0.0, 0.5, 1.0, 1.7), top_k=one_of(0, 1, 7, 1000), top_p=one_of(1.0, 0.3, 0.9),
        min_p=one_of(0.0, 0.0, 0.1), repetition=one_of(1.0, 1.3), presence=0.2, frequency=0.1,
        uniform=torch.rand(rows, generator=generator),
    )  # fmt: skip
    logits = 3 * random(rows, vocabulary, seed=seed)
    history = torch.randint(-1, vocabulary, (rows, 9), generator=generator)
    prompts = torch.randint(0, 9, (rows,), generator=generator)
    mask = packed_mask(torch.rand(rows, vocabulary, generator=generator) < 0.8)
    same(*draw(use, logits, chosen, history, prompts, mask))


@pytest.mark.parametrize("candidates", [16, 64])
def test_what_stays_may_be_more_than_the_candidates(use, candidates, monkeypatch):
    monkeypatch.setattr("liaoyuan.ops.triton.sampling.CANDIDATES", candidates)
    logits = 3 * random(8, 300)
    chosen = sampling_settings(
        8, temperature=torch.tensor([0.5, 2.0] * 4), top_k=torch.tensor([0, 0, 40, 40, 0, 12, 1000, 7]),
        top_p=torch.tensor([0.999, 0.3, 1.0, 0.9, 1.0, 0.999, 0.9, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 1e-3, 0.0, 0.0, 0.5]), uniform=torch.linspace(0.05, 0.999, 8),
    )  # fmt: skip
    same(*draw(use, logits, chosen, None, None, packed_mask(random(8, 300, seed=1) < 1)))


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}, {}], ids=str)
def test_equal_tokens_are_drawn_in_the_order_of_the_vocabulary(use, setting):
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    for uniform in (0.0, 0.3, 0.95):
        same(*draw(use, logits, sampling_settings(1, uniform=uniform, **setting), None, None, None))


def test_draws_have_the_shares_of_the_softmax(use):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(10, 4)
    for setting in ({}, {"top_k": 4}):
        uniform = (torch.arange(10) + 0.5) / 10
        found = use("sample_tokens").call(
            *place(logits, sampling_settings(10, uniform=uniform, **setting), *[None] * 3)
        )
        assert (found[0].bincount() - torch.tensor([1, 2, 3, 4], device=found[0].device)).abs().max() == 0


def test_a_row_without_a_token_to_draw_gets_none(use):
    logits = random(4, 40)
    logits[0, 3], logits[1, 5] = torch.nan, torch.inf
    allowed = torch.ones(4, 40, dtype=torch.bool)
    allowed[2] = False
    found, expected = draw(use, logits, sampling_settings(4, top_k=3, uniform=0.5), None, None, packed_mask(allowed))
    assert found[0][:3].tolist() == [-1, -1, -1] and found[1][:3].isnan().all() and found[2][:3].isnan().all()
    same(found, expected)


def test_the_bits_of_a_row_depend_neither_on_other_rows_nor_on_the_tile(use, monkeypatch):
    logits, chosen = 3 * random(3, 300), sampling_settings(3, top_p=0.9, uniform=torch.linspace(0.1, 0.9, 3))
    operator = use("sample_tokens")
    whole = operator.call(*place(logits, chosen, None, None, None))
    alone = operator.call(*place(logits[1:2], chosen[1:2], None, None, None))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))
    monkeypatch.setattr("liaoyuan.ops.triton.sampling.TILE", 64)
    tiled = operator.call(*place(logits, chosen, None, None, None))
    assert torch.equal(tiled[0], whole[0]) and torch.equal(tiled[2], whole[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_scores_a_token_with_the_bits_that_drawing_it_gave(use, dtype):
    hidden, weight = random(5, 32, dtype=dtype), random(9000, 32, dtype=dtype, seed=1)  # more than one tile of logits
    logits = use("linear").call(*place(hidden, weight, None, None))
    settings = place(sampling_settings(5, temperature=1.0, uniform=torch.linspace(0.1, 0.9, 5)))[0]
    token, drawn, _ = use("sample_tokens").call(logits, settings, None, None, None)
    chosen, height, *_ = use("loss_head").call(*place(hidden, weight), token, 0, 9000, False, False)
    assert torch.equal(drawn, log_probability(chosen, height))
    assert torch.equal(height, use("log_sum_exp").call(logits))
