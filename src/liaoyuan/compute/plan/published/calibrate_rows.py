"""Figures from few rows: what a source's calibration rows tell about it, its cards' generation, and all others.

All figures are log-normal, so the logarithm of a time is close to linear in them, and what rows say of them is a
Gaussian posterior in closed form (Rasmussen and Williams 2006, "Gaussian processes for machine learning", section 2.2,
with the covariance that the sensitivities give): a figure has a part that all share, one of its generation and one of
its source. What a row leaves open adds the covariance of its draws with those of other rows of its source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liaoyuan.compute.plan.published.cases import FIGURES, NAMES, PRIVATE, Case

NOISE = 0.04  # of a measurement that no figure explains
SHARED = 0.8  # of the variance of what is left open, the part that rows of a source have in common
ROUNDS = 3  # of looking again how times depend on figures, where those have moved to
PROGRAM = 0.09  # of a program of a source, which all of its rows share
CAREFUL = 2.0
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
    for index in case.asked(which):
        step = 0.7 * FIGURES[NAMES[index]].total
        up, down = figures.copy(), figures.copy()
        up[index] += step
        down[index] -= step
        found[index] = (case.reported(which, up) - case.reported(which, down)) / (2 * step)
    return found


class Ties:
    """Which rows [rows, rows] are of one generation and of one source, and how much of each figure they share."""

    def __init__(self, cases: Sequence[Case]) -> None:
        generations = np.array([case.where.generation for case in cases])
        sources = np.array([case.row.source for case in cases])
        programs = np.array([case.row.program for case in cases])
        self.source = sources[:, None] == sources
        self.program = self.source & (programs[:, None] == programs)
        masks = {"everywhere": np.ones_like(self.source), "generation": generations[:, None] == generations}
        self.parts = [
            (mask, np.array([getattr(one, name) ** 2 for one in FIGURES.values()]))
            for name, mask in {**masks, "source": self.source}.items()
        ]

    def covariance(self, near: Linear, private: float = PRIVATE) -> tuple[np.ndarray, np.ndarray]:
        """Return that of the rows' logarithms [rows, rows], and the part of it that comes from what rows leave open."""
        left_open = near.spread @ near.spread.T / near.spread.shape[1]
        own = near.slopes**2 @ (private**2 * self.parts[-1][1])
        opened = (
            PROGRAM**2 * self.program
            + SHARED * self.source * left_open
            + np.diag((1 - SHARED) * np.diag(left_open) + own)
        )
        return opened + sum(mask * ((near.slopes * part) @ near.slopes.T) for mask, part in self.parts), opened

    def figures(self, slopes: np.ndarray, weights: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Return the figures [rows, figures] that weights [used] of calibration rows with such slopes ask for."""
        pulled = slopes[used] * weights[:, None]
        return sum((mask[:, used] @ pulled) * part for mask, part in self.parts)


def weights(inside: np.ndarray, misfit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (weights, inverse of the covariance) of calibration rows: one that fits none counts less (Huber 1964)."""
    noise = np.full(len(misfit), NOISE**2)
    for _ in range(3):
        inverse = np.linalg.inv(inside + np.diag(noise))
        found = inverse @ misfit
        apart = np.abs(found) / np.sqrt(np.diag(inverse))  # of each from what the others tell, in standard deviations
        noise = NOISE**2 * np.maximum(1.0, apart / HUBER) ** 2
    return found, inverse


def believed(
    near: Linear, cases: Sequence[Case], used: np.ndarray, rows: Sequence[int], rounds: int = ROUNDS
) -> Belief:
    """Return what calibration rows in `used` (indices) tell about `rows` (indices).

    Figures move away from where `near` took the times as linear: calibration rows are looked at again there, one time
    less than `rounds`.
    """
    ties = Ties(cases)
    if not len(used):
        sigma = np.sqrt(np.diag(ties.covariance(near)[0]) + NOISE**2)
        return Belief(near.mean[list(rows)], sigma[list(rows)])
    measured = np.array([case.measured for case in cases])
    mean, slopes = near.mean.copy(), near.slopes.copy()
    for number in range(rounds):
        now = Linear(mean, slopes, near.spread)
        shared, opened = ties.covariance(now)
        found, inverse = weights(shared[np.ix_(used, used)], (measured - mean)[used])
        figures = ties.figures(slopes, found, used)
        if number + 1 == rounds:
            break
        again = linear([cases[index] for index in used], figures[used])
        mean[used], slopes[used] = again.mean, again.slopes
    wanted = np.array(rows, dtype=int)
    across = shared[np.ix_(wanted, used)]
    variance = np.diag(shared)[wanted] - np.einsum("ij,jk,ik->i", across, inverse, across)
    there = [cases[index].predicted(figures[index])[cases[index].draws].mean() for index in rows]
    return Belief(np.array(there) + opened[np.ix_(wanted, used)] @ found, np.sqrt(np.maximum(variance, 0.0) + NOISE**2))


def chosen(near: Linear, cases: Sequence[Case], most: int = 3) -> list[int]:
    """Return the rows to calibrate by: of each source at most `most` and at most half, those whose measurement would
    narrow the intervals of all its rows most (greedily; measured values are not looked at), complete ones first.

    While choosing, what is a row's own counts `CAREFUL` times: rows that lean on what is least known are bad witnesses.
    """
    shared, _ = Ties(cases).covariance(near, CAREFUL * PRIVATE)
    found = list[int]()
    sources = dict[str, list[int]]()
    for index, case in enumerate(cases):
        sources.setdefault(case.row.source, []).append(index)
    for rows in sources.values():
        inside = shared[np.ix_(rows, rows)]
        able = [place for place, index in enumerate(rows) if cases[index].row.complete] or list(range(len(rows)))
        taken = list[int]()
        for _ in range(min(most, len(rows) // 2, len(able))):
            left = (place for place in able if place not in taken)
            taken.append(min(left, key=lambda place: _remaining(inside, [*taken, place])))
        found += [rows[place] for place in taken]
    return sorted(found)


def _remaining(covariance: np.ndarray, taken: list[int]) -> float:
    """Return the standard deviations that are left of all rows together once those in `taken` are measured."""
    inside = covariance[np.ix_(taken, taken)] + (CAREFUL * NOISE) ** 2 * np.eye(len(taken))
    across = covariance[:, taken]
    left = np.diag(covariance) - np.einsum("ij,ji->i", across, np.linalg.solve(inside, across.T))
    return float(np.sqrt(np.maximum(left, 0.0)).sum())
