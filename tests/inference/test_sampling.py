"""Sampling is right in distribution, keeps to its filters, and is a function of (seed, position)."""

import numpy as np
import pytest
import torch

from liaoyuan.inference.sampling import Settings, sample, top_logprobs, uniform
from liaoyuan.ops import sampling_settings


def settings(
    rows: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, seed: int = 0
) -> Settings:
    number = uniform(np.full(rows, seed, dtype=np.uint64), np.arange(rows))
    return of_columns(rows, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, uniform=number)


def of_columns(rows: int, **columns: float | list[float] | np.ndarray) -> Settings:
    return Settings(sampling_settings(rows, **columns).numpy())


def filtered(probabilities: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The definition, token by token: keep the best k, then the least set of mass top_p, then those near the best."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = order[: top_k or len(order)]
    mass = sum(probabilities[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if reached >= top_p * mass:
            break
        nucleus.append(token)
        reached += probabilities[token]
    final = [token for token in nucleus if probabilities[token] >= min_p * probabilities[order[0]]]
    out = np.zeros_like(probabilities)
    out[final] = probabilities[final]
    return out / out.sum()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return the statistic in standard deviations over its mean; cells under 5 expected are pooled."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    freedom = len(counts) - 2
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 30},
        {"top_p": 0.8},
        {"min_p": 0.02},
        {"temperature": 1.3, "top_k": 80, "top_p": 0.9, "min_p": 0.01},
    ],
)
def test_samples_follow_their_distribution(parameters: dict) -> None:
    rows, vocabulary = 20_000, 150
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    tokens, _, _ = sample(logits.expand(rows, -1), settings(rows, **parameters))
    hot = (logits.double() / parameters.get("temperature", 1.0)).softmax(-1).numpy()
    expected = filtered(hot, *(parameters.get(name, off) for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0))))
    counts = np.bincount(tokens.numpy(), minlength=vocabulary)
    assert counts[expected == 0].sum() == 0
    assert abs(chi_square(counts[expected > 0], rows * expected[expected > 0])) < 5


def test_mixed_rows_get_each_their_own_parameters() -> None:
    rows, generator = 64, torch.Generator().manual_seed(2)
    logits = torch.randn(rows, 200, generator=generator)
    mixed = of_columns(
        rows,
        temperature=[0.0, 1.0, 0.5, 2.0] * 16,
        top_p=[1.0, 0.5, 1.0, 0.9] * 16,
        top_k=[0, 0, 3, 0] * 16,
        min_p=[0.0, 0.0, 0.0, 0.3] * 16,
        uniform=uniform(np.zeros(rows, dtype=np.uint64), np.arange(rows)),
    )
    tokens, logprobs, _ = sample(logits, mixed)
    for row in range(rows):
        token, logprob, _ = sample(logits[row : row + 1], mixed.of(np.array([row])))
        assert (token, logprob) == (tokens[row], logprobs[row])
    assert torch.equal(tokens[::4], logits[::4].argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_the_ends_of_the_interval_give_tokens_of_probability_above_zero() -> None:
    logits = torch.full((2, 130), -torch.inf)
    logits[:, [64, 100]] = 0.0
    ends = of_columns(2, uniform=[0.0, 1 - 2.0**-52])
    assert sample(logits, ends)[0].tolist() == [64, 100]


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(200), indexing="ij")
    numbers = uniform(seeds.ravel(), positions.ravel())
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert abs(chi_square(np.histogram(numbers, 100, (0, 1))[0], np.full(100, 600.0))) < 5
    grid = numbers.reshape(300, 200) - 0.5
    for first, second in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, :-1], grid[:-1, 1:])):
        assert abs(12 * (first * second).mean()) < 5 / np.sqrt(first.size)
    assert len(np.unique(numbers)) == numbers.size


def test_top_log_probabilities() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    tokens, values = top_logprobs(logits, 5)
    assert torch.equal(tokens, logits.sort(dim=-1, descending=True).indices[:, :5])
    torch.testing.assert_close(values, logits.log_softmax(-1).gather(1, tokens))
