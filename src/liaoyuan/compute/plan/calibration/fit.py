"""Few positive figures from measured times of which some are spoilt: robust least squares in logarithms.

Errors of timings are shares of them, so logarithms are compared; an error beyond `BEND` spreads counts by its size and
not by its square (Huber 1964, "Robust estimation of a location parameter").
"""

from collections.abc import Callable

import numpy as np

BEND = 1.345  # spreads, with which 95% of the efficiency of least squares is kept on normal errors
STEP, ROUNDS = 1e-4, 40
LEAST_SPREAD = 0.01  # no timing is better than that
HOLD = 0.02  # how strongly a figure is held near where it began, in spreads of 1: what no timing tells stays there

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]


def fit(told: Callable[[Numbers], Numbers], start: Numbers, measured: Numbers) -> tuple[Numbers, Numbers]:
    """Return the figures with which `told` comes nearest to what was measured, and log(measured / told) of each.

    Args:
        told: of the figures, all positive, gives the times. start: the figures to begin with.
    """

    def off(logs: Numbers) -> Numbers:
        return np.asarray(np.log(measured) - np.log(told(np.exp(logs))))

    logs = origin = np.log(start)
    damping, now = 1e-3, off(logs)
    for _ in range(ROUNDS):
        spread = max(1.4826 * float(np.median(np.abs(now))), LEAST_SPREAD)
        weights = np.minimum(1.0, BEND * spread / np.maximum(np.abs(now), 1e-12))
        moves = STEP * np.eye(len(logs))
        slopes = np.stack([(off(logs + move) - now) / STEP for move in moves], axis=1)
        square = slopes.T @ (weights[:, None] * slopes) + HOLD**2 * np.eye(len(logs))
        descent = slopes.T @ (weights * now) + HOLD**2 * (logs - origin)
        change = np.linalg.solve(square + damping * np.diag(np.diag(square)), -descent)
        following = logs + np.clip(change, -1.0, 1.0)
        then = off(following)
        if _loss(then, spread, following - origin) < _loss(now, spread, logs - origin):
            logs, now, damping = following, then, damping / 4
            if np.abs(change).max() < 1e-5:
                break
        else:
            damping = damping * 8 + 1e-6
    return np.exp(logs), now


def _loss(off: Numbers, spread: float, moved: Numbers) -> float:
    size = np.abs(off)
    bend = BEND * spread
    inside = np.where(size <= bend, size**2 / 2, bend * (size - bend / 2))
    return float(inside.sum() + HOLD**2 * (moved**2).sum() / 2)
