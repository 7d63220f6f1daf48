"""Sampling: what the filters of transformers leave, drawn by the number that is given, every row by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hugging_face

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import packed_mask, sample_tokens, sampling_settings
from liaoyuan.ops.sampling import SAMPLE_TOKENS
from tests.ops.cases import random

WAYS = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.3, "repetition": 1.3, "top_p": 0.95},
    {"repetition": 0.8, "presence": 0.7, "frequency": 0.4, "top_k": 200},
]


def numbers(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_transformers_does(logits: torch.Tensor, history: torch.Tensor, way: dict) -> torch.Tensor:
    """Return the scores of one row [1, V] after the processors of `generate`, in its order."""
    scores = logits.clone()
    steps = [
        ("repetition", lambda x: hugging_face.RepetitionPenaltyLogitsProcessor(x)),
        ("temperature", hugging_face.TemperatureLogitsWarper),
        ("top_k", hugging_face.TopKLogitsWarper),
        ("top_p", hugging_face.TopPLogitsWarper),
        ("min_p", hugging_face.MinPLogitsWarper),
    ]
    for name, processor in steps:
        if name in way:
            scores = processor(way[name])(history, scores)
        if name == "repetition" and "frequency" in way:  # transformers has none: as the OpenAI API defines them
            counts = torch.bincount(history[0], minlength=scores.shape[1])
            scores = scores - way["frequency"] * counts - way["presence"] * (counts > 0)
    return scores


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_tokens_and_log_probabilities_are_those_of_transformers_processors(way, spread):
    rows, vocabulary = 40, 500
    logits, history = spread * random(rows, vocabulary), torch.arange(rows * 9).reshape(rows, 9) % 50
    drawn = sample_tokens(logits, sampling_settings(rows, uniform=numbers(rows), **way), history)
    for row in range(rows):
        left = as_transformers_does(logits[row : row + 1], history[row : row + 1], way).double().softmax(-1)[0]
        token = drawn.tokens[row]
        assert left[token] > 0
        torch.testing.assert_close(drawn.filtered_log_probs[row], left[token].log().float(), atol=1e-4, rtol=1e-4)
        order = left.argsort(descending=True, stable=True) if way.keys() & {"top_k", "top_p", "min_p"} else slice(None)
        sums = left[order].cumsum(0)
        place = (sums <= numbers(rows)[row] * sums[-1]).sum()
        assert token == torch.arange(vocabulary)[order][place]
    torch.testing.assert_close(drawn.log_probs, logits.log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0])


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.sampled_from([1, 2, 15, 63, 64, 65, 128, 333, 5000]),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    way=st.sampled_from([*WAYS, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 9999}]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_history=st.booleans(),
    with_mask=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_kernel_draws_what_the_reference_draws(rows, vocabulary, spread, way, dtype, with_history, with_mask, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = random(rows, vocabulary, dtype=dtype, seed=seed) * spread  # bf16 has many equal logits
    history = torch.randint(-1, vocabulary, (rows, 20), generator=generator) if with_history else None
    prompts = torch.randint(0, 20, (rows,), generator=generator) if with_history else None
    allowed = torch.rand(rows, vocabulary, generator=generator) < 0.5 if with_mask else None
    table = sampling_settings(rows, uniform=numbers(rows, seed), **way)
    found = sample_tokens(logits, table, history, prompts, allowed)
    expected = SAMPLE_TOKENS.reference(
        logits.double(), table, history, prompts, None if allowed is None else packed_mask(allowed)
    )
    assert torch.equal(found.tokens, expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_depend_on_that_row_alone(dtype):
    rows = 24
    logits, history = 2 * random(rows, 3000, dtype=dtype), torch.arange(rows * 5).reshape(rows, 5)
    columns = {name: torch.tensor([float(way.get(name, off)) for way in WAYS] * 3) for name, off in (
        ("temperature", 1), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("repetition", 1), ("presence", 0))}  # fmt: skip
    table = sampling_settings(rows, uniform=numbers(rows), **columns)
    whole = sample_tokens(logits, table, history)
    for part in (slice(0, 1), slice(3, 4), slice(5, 20), slice(23, 24)):
        alone = sample_tokens(logits[part], table[part], history[part])
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(sample_tokens(logits, table, history), whole, strict=True))
    finally:
        torch.set_num_threads(1)


def test_greedy_takes_the_first_of_the_most_probable():
    logits = torch.zeros(2, 200)
    logits[:, [70, 150]] = 4.0
    drawn = sample_tokens(logits, sampling_settings(2, temperature=0.0, uniform=0.99))
    assert drawn.tokens.tolist() == [70, 70]
    assert drawn.filtered_log_probs.tolist() == [0.0, 0.0]


def test_the_mask_may_be_bits_or_booleans_and_forbids():
    allowed = torch.zeros(3, 100, dtype=torch.bool)
    allowed[:, [31, 32, 99]] = True
    logits, table = random(3, 100), sampling_settings(3, uniform=numbers(3))
    drawn = sample_tokens(logits, table, mask=allowed)
    assert allowed.gather(1, drawn.tokens[:, None]).all()
    by_bits = sample_tokens(logits, table, mask=packed_mask(allowed))
    assert all(torch.equal(a, b) for a, b in zip(by_bits, drawn, strict=True))
    strided = sample_tokens(logits.t().contiguous().t(), table, mask=allowed)
    assert torch.equal(strided.tokens, drawn.tokens)


@pytest.mark.parametrize("way", [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_p": 0.5}], ids=str)
def test_a_row_without_a_token_harms_no_other(way):
    logits, allowed = random(4, 90), torch.ones(4, 90, dtype=torch.bool)
    logits[1, 7], allowed[2] = torch.nan, False
    drawn = sample_tokens(logits, sampling_settings(4, uniform=0.5, **way), mask=allowed)
    assert drawn.tokens[1:3].tolist() == [-1, -1]
    assert drawn.log_probs[1:3].isnan().all() and drawn.filtered_log_probs[1:3].isnan().all()
    good = sample_tokens(logits[[0, 3]], sampling_settings(2, uniform=0.5, **way), mask=allowed[[0, 3]])
    assert torch.equal(drawn.tokens[[0, 3]], good.tokens)


def test_what_does_not_fit_is_named():
    logits, table = random(2, 40), sampling_settings(2)
    with pytest.raises(LiaoyuanError, match=r"settings \[3, 8\] does not fit logits \[2, 40\]"):
        sample_tokens(logits, sampling_settings(3))
    with pytest.raises(LiaoyuanError, match=r"mask \[2, 3\] does not fit logits \[2, 40\]: it must be \[2, 2\]"):
        sample_tokens(logits, table, mask=torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(LiaoyuanError, match=r"prompt_lengths \[1\] does not fit"):
        sample_tokens(logits, table, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(LiaoyuanError, match="no sampling setting 'top_q'"):
        sampling_settings(2, top_q=1)
