"""Figures from few rows: what a source's calibration rows tell about it, its cards' generation, and all others.

All figures are log-normal, so the logarithm of a time is close to linear in them, and what rows say of them is a
Gaussian posterior in closed form (Rasmussen and Williams 2006, "Gaussian processes for machine learning", section 2.2,
with the covariance that the sensitivities give): a figure has a part that all share, one of its generation and one of
its source. What a row leaves open adds the covariance of its draws with those of other rows of its source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liaoyuan.compute.plan.published.cases import FIGURES, NAMES, Case

NOISE = 0.04  # of a measurement that no figure explains
SHARED = 0.7  # of the variance of what is left open, the part that rows of a source have in common
HUBER = 1.5  # standard deviations beyond which a calibration row counts less


@dataclass(frozen=True)
class Linear:
    """Cases near some figures: mean [rows] at the figures 0, slopes [rows, figures], spread [rows, draws]."""

    mean: np.ndarray
    slopes: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True)
class Belief:
    """Of rows: the logarithm of a time, and its standard deviation."""

    mean: np.ndarray
    sigma: np.ndarray


def linear(cases: Sequence[Case], at: np.ndarray) -> Linear:
    """Return the cases as linear in their figures, around those in `at` [rows, figures]."""
    means, slopes, spreads = list[float](), list[np.ndarray](), list[np.ndarray]()
    for case, figures in zip(cases, at, strict=True):
        values = case.predicted(figures)
        drawn = values[case.draws]
        mean = float(drawn.mean())
        slope = _slopes(case, figures, int(np.argmin(np.abs(values - mean))))
        means.append(mean - float(slope @ figures))
        slopes.append(slope)
        spreads.append(drawn - mean)
    return Linear(np.array(means), np.array(slopes), np.array(spreads))


def _slopes(case: Case, figures: np.ndarray, which: int) -> np.ndarray:
    """Return by how much the logarithm of the time rises with that of each figure, over the middle of its range."""
    found = np.zeros(len(NAMES))
    for index, name in enumerate(NAMES):
        step = 0.7 * FIGURES[name].total
        up, down = figures.copy(), figures.copy()
        up[index] += step
        down[index] -= step
        found[index] = (case.reported(which, up) - case.reported(which, down)) / (2 * step)
    return found


def alike(cases: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows [rows, rows] are of one generation, and which of one source."""
    generations = np.array([case.where.generation for case in cases])
    sources = np.array([case.row.source for case in cases])
    return generations[:, None] == generations, sources[:, None] == sources


def covariance(near: Linear, cases: Sequence[Case]) -> np.ndarray:
    """Return that of the rows' logarithms [rows, rows], without the noise of measurements."""
    generation, source = alike(cases)
    spreads = FIGURES.values()
    parts = [
        np.array([getattr(spread, name) ** 2 for spread in spreads]) for name in ("everywhere", "generation", "source")
    ]
    slopes = near.slopes
    found = (slopes * parts[0]) @ slopes.T
    found += generation * ((slopes * parts[1]) @ slopes.T)
    found += source * ((slopes * parts[2]) @ slopes.T)
    left_open = near.spread @ near.spread.T / near.spread.shape[1]
    return found + SHARED * source * left_open + np.diag((1 - SHARED) * np.diag(left_open))


def weights(covariance: np.ndarray, misfit: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (weights [used], inverse [used, used]) of calibration rows: a row that fits none counts less (Huber)."""
    inside = covariance[np.ix_(used, used)]
    noise = np.full(len(used), NOISE**2)
    for _ in range(3):
        inverse = np.linalg.inv(inside + np.diag(noise))
        found = inverse @ misfit[used]
        apart = np.abs(found) / np.sqrt(np.diag(inverse))  # of each from what the others tell, in standard deviations
        noise = np.where(apart > HUBER, NOISE**2 * (apart / HUBER) ** 2, NOISE**2)
    return found, inverse


def believed(near: Linear, cases: Sequence[Case], used: np.ndarray) -> tuple[Belief, np.ndarray]:
    """Return what the rows in `used` (indices) tell about all, and the figures [rows, figures] that follow for each."""
    shared = covariance(near, cases)
    measured = np.array([case.measured for case in cases])
    if not len(used):
        return Belief(near.mean, np.sqrt(np.diag(shared) + NOISE**2)), np.zeros_like(near.slopes)
    found, inverse = weights(shared, measured - near.mean, used)
    across = shared[:, used]
    mean = near.mean + across @ found
    variance = np.diag(shared) - np.einsum("ij,jk,ik->i", across, inverse, across)
    generation, source = alike(cases)
    figures = np.zeros_like(near.slopes)
    pulled = near.slopes[used] * found[:, None]
    for part, mask in (("everywhere", np.ones_like(source)), ("generation", generation), ("source", source)):
        spread = np.array([getattr(one, part) ** 2 for one in FIGURES.values()])
        figures += (mask[:, used] @ pulled) * spread
    return Belief(mean, np.sqrt(np.maximum(variance, 0.0) + NOISE**2)), figures


def chosen(near: Linear, cases: Sequence[Case], most: int = 3) -> list[int]:
    """Return the rows to calibrate by: of each source at most `most` and at most half, those whose measurement would
    narrow the predictions of its others most (greedily; measured values are not looked at), complete ones first.
    """
    shared = covariance(near, cases)
    found = list[int]()
    sources = dict[str, list[int]]()
    for index, case in enumerate(cases):
        sources.setdefault(case.row.source, []).append(index)
    for rows in sources.values():
        inside = shared[np.ix_(rows, rows)]
        able = [place for place, index in enumerate(rows) if cases[index].row.complete] or list(range(len(rows)))
        taken = list[int]()
        for _ in range(min(most, len(rows) // 2)):
            left = [place for place in able if place not in taken]
            if not left:
                break
            taken.append(min(left, key=lambda place: _remaining(inside, [*taken, place])))
        found += [rows[place] for place in taken]
    return sorted(found)


def _remaining(covariance: np.ndarray, taken: list[int]) -> float:
    """Return the variance that is left of all rows together once those in `taken` are measured."""
    inside = covariance[np.ix_(taken, taken)] + NOISE**2 * np.eye(len(taken))
    across = covariance[:, taken]
    return float(np.trace(covariance) - np.trace(across @ np.linalg.solve(inside, across.T)))
