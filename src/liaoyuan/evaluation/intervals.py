"""Intervals by the bootstrap over problems and seeds (Efron 1979; two-level resampling, Davison and Hinkley 1997, 3.8).

An outcome array is [seeds, problems]: the same problems were given to the models of every seed. A resample draws
seeds with replacement and problems with replacement, independently, so the interval covers both "another set of
problems" and "another training run". With one seed only the problems are drawn, and the interval says less.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 4000
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


def _interval(
    arrays: list[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> Interval:
    """Return `statistic` of the arrays' means (means [A, R] -> [R]) with its percentile interval over resamples."""
    values = np.stack([np.atleast_2d(array) for array in arrays]).astype(np.float64)
    _, seeds, problems = values.shape
    random = np.random.default_rng(seed)
    means = np.empty((len(arrays), resamples))
    for index in range(resamples):
        by_problem = values[:, random.integers(seeds, size=seeds)].mean(1)
        means[:, index] = by_problem[:, random.integers(problems, size=problems)].mean(1)
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(statistic(means), [tail, 1.0 - tail])
    return Interval(float(statistic(values.mean((1, 2))[:, None])[0]), float(low), float(high))
