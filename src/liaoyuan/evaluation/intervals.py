"""Intervals by the bootstrap over problems and seeds (Efron 1979; two-level resampling, Davison and Hinkley 1997, 3.8).

An outcome array is [seeds, problems]: the same problems were given to the models of every seed. A resample draws
seeds with replacement and problems with replacement, independently, so the interval covers both "another set of
problems" and "another training run". With one seed only the problems are drawn, and the interval says less.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its `LEVEL` interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(outcomes: np.ndarray | Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return mean and percentile interval of `outcomes`, float [seeds, problems].

    For a paired difference of two models give the difference of their outcome arrays.
    """
    return _interval([np.asarray(outcomes)], lambda means: means[0], resamples, seed)


def difference_to_best(
    outcomes: np.ndarray, controls: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return mean(outcomes) - max over controls of mean(control), paired by seed and problem; all [seeds, problems].

    The best control is chosen anew in every resample, which is to the controls' favour.
    """
    arrays = [np.asarray(array) for array in (outcomes, *controls)]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("paired outcomes must have one shape")
    return _interval(arrays, lambda means: means[0] - means[1:].max(0), resamples, seed)


def ratio(amounts: np.ndarray, sizes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return sum(amounts) / sum(sizes), such as a mean over the tokens of records, with its interval over the records.

    Both float [records]; for a paired difference of two models give the difference of their amounts.
    """
    return _interval([np.asarray(amounts), np.asarray(sizes)], lambda means: means[0] / means[1], resamples, seed)


def _interval(
    arrays: list[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> Interval:
    """Return `statistic` of the arrays' means (means [A, R] -> [R]) with its percentile interval over resamples."""
    values = np.stack([np.atleast_2d(array) for array in arrays]).astype(np.float32)
    _, seeds, problems = values.shape
    by_seed = values @ _shares(problems, resamples, 2 * seed).T  # [A, S, R], each resample's mean over problems
    means = np.einsum("asr,rs->ar", by_seed, _shares(seeds, resamples, 2 * seed + 1))
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(statistic(means), [tail, 1.0 - tail])
    return Interval(float(statistic(values.mean((1, 2), dtype=np.float64)[:, None])[0]), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _shares(count: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each of `count` items is drawn in each resample, as shares: float32 [resamples, count]."""
    random = np.random.default_rng(seed)
    drawn = random.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * count)
    return (counts / count).astype(np.float32).reshape(resamples, count)
