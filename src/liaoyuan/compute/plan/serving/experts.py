"""Where experts lie, and what that costs: from a trace of how often each was chosen, window by window.

The placements are those of `inference.expert_placement`, made of the windows before and measured on the one that comes:
what a running engine would have had.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.expert_placement import LoadAverage, apply, imbalance, rank_loads, rebalance
from liaoyuan.inference.spread.balance import HALF_LIVES, PRICE
from liaoyuan.parallel.expert_table import first_placement

DRAWS = 256  # by which the part of chance is told


@dataclass(frozen=True)
class Spread:
    """Experts over `ranks` processes with `copies` further slots in each.

    moved: whether they are moved between windows. imbalance, worst: the busiest process's rows over the mean, of whole
    windows: the mean over windows and layers, and the window with the highest mean over layers. shares: of the rows,
    the mean share of the busiest process, the second and so on. moves: experts sent from a process to another.
    """

    ranks: int
    copies: int
    moved: bool
    imbalance: float
    worst: float
    shares: tuple[float, ...]
    moves: int


def read_counts(path: Path) -> np.ndarray:
    """Return how often each expert was chosen, fp64 [windows, layers, experts].

    path: a NumPy file of such an array (more dimensions before the last two are windows too), or JSON Lines, a window a
        line: {"counts": [[of each expert] of each layer]}.

    Raises:
        LiaoyuanError: it is neither.
    """
    try:
        if path.suffix == ".npy":
            counts = np.load(path, allow_pickle=False)
        else:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            counts = np.array([json.loads(line)["counts"] for line in lines], dtype=np.float64)
        counts = counts.reshape(-1, *counts.shape[-2:]).astype(np.float64)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LiaoyuanError(
            f"{path} is no trace of routers: a NumPy array [windows, layers, experts] of counts, or JSON Lines with "
            f"counts of one window each ({error})."
        ) from error
    if counts.ndim != 3 or len(counts) < 2 or not np.isfinite(counts).all() or counts.min() < 0:
        raise LiaoyuanError(f"{path}: two windows or more of counts that are 0 or more are needed.")
    return counts


def spread(counts: np.ndarray, ranks: int, copies: int = 0, moved: bool = True) -> Spread:
    """Return what the windows after the first meet; counts: [windows, layers, experts].

    Raises:
        LiaoyuanError: the processes do not divide the experts, or are to have more copies than there are others.
    """
    _, layers, experts = counts.shape
    if experts % ranks:
        raise LiaoyuanError(f"{ranks} processes do not divide the {experts} experts of the trace.")
    if not 0 <= copies <= experts - experts // ranks:
        raise LiaoyuanError(f"{copies} copies are more than the {experts - experts // ranks} experts held elsewhere.")
    slots = experts // ranks + copies
    placement = np.stack([first_placement(experts, ranks, slots)] * layers)
    average, found, shares, moves = LoadAverage(*HALF_LIVES), [], [], 0
    for number, window in enumerate(counts):
        if number:
            found.append(imbalance(placement, window))
            shares.append(np.sort(rank_loads(placement, window), axis=-1)[:, ::-1] / ranks)
        average.add(window)
        if moved and number + 1 < len(counts):
            steps = rebalance(placement, average.load(), PRICE)
            moves += sum(len(step.moves) for step in steps)
            placement = apply(placement, steps)
    means = np.stack(found).mean(1)
    return Spread(
        ranks,
        copies,
        moved,
        float(means.mean()),
        float(means.max()),
        tuple(np.mean(np.concatenate(shares), axis=0).tolist()),
        moves,
    )


def spreads(counts: np.ndarray, ranks: int, copies: Sequence[int]) -> list[Spread]:
    """Return what it costs to let experts lie, and to move them with so many further slots."""
    return [spread(counts, ranks, moved=False), *(spread(counts, ranks, each) for each in copies)]


@lru_cache(maxsize=16384)
def busiest(shares: tuple[float, ...], choices: int) -> float:
    """Return how many of `choices` come to the process that gets most, over the mean, on average.

    shares: the probabilities of the processes. With few choices chance makes one busy however equal they are.
    """
    draws = np.random.default_rng(0).multinomial(choices, np.array(shares) / sum(shares), DRAWS)
    return float(draws.max(1).mean() * len(shares) / choices)
