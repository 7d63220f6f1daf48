"""Which levels of difficulty reinforcement learning is given: one scheduler with three ways to choose.

"signal": a level is drawn in proportion to the share of its recent groups that taught something, which are those
whose samples were neither all right nor all wrong (learnability: Tzannetos et al. 2023, arXiv 2304.12877; Foster and
Foerster 2025, arXiv 2502.12272). As the model improves, the levels that are drawn become harder by themselves.

"bounds": the share of problems that is solved is kept between two bounds. Levels whose own share is between them are
drawn alike; where there is none, the hardest that is too easy and the easiest that is too hard are mixed, so that half
the way between the bounds is solved.

"none": all levels alike, for comparison.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Staging = Literal["signal", "bounds", "none"]

MEMORY = 0.05  # weight of a new group in its level's share: about the last twenty groups count
FLOOR = 0.1  # share that a level is taken to have at least, so that one which was too hard is tried again
UNKNOWN = 0.5  # solved share of a level that was never drawn


@dataclass(frozen=True)
class Shares:
    """What is known of each level from its recent groups, in [0, 1]: the share that taught, the share solved."""

    signal: tuple[float, ...]
    solved: tuple[float, ...]


def fresh_shares(levels: Sequence[int]) -> Shares:
    """Return what is known before the first group."""
    return Shares((1.0,) * len(levels), (UNKNOWN,) * len(levels))


def level_weights(staging: Staging, shares: Shares, bounds: tuple[float, float]) -> list[float]:
    """Return the weights with which levels are drawn."""
    if staging == "none":
        return [1.0] * len(shares.signal)
    if staging == "signal":
        return [max(FLOOR, share) for share in shares.signal]
    tilted, count = _within(shares.solved, bounds), len(shares.solved)
    return [(1 - FLOOR) * weight + FLOOR / count for weight in tilted]


def draw_levels(weights: Sequence[float], levels: Sequence[int], count: int, seed: str) -> list[int]:
    """Return the levels of `count` problems, drawn with these weights."""
    return random.Random(seed).choices(levels, weights, k=count)


def follow(
    shares: Shares, levels: Sequence[int], drawn: Sequence[int], taught: Sequence[bool], solved: Sequence[float]
) -> Shares:
    """Return the shares after groups of the levels `drawn`: whether each taught, and its solved share.

    A group that could not be judged has nan as its solved share, and says nothing.
    """
    signal, right = (dict(zip(levels, column, strict=True)) for column in (shares.signal, shares.solved))
    for level, useful, share in zip(drawn, taught, solved, strict=True):
        if math.isnan(share):
            continue
        signal[level] += MEMORY * (useful - signal[level])
        right[level] += MEMORY * (share - right[level])
    return replace(shares, signal=tuple(signal.values()), solved=tuple(right.values()))


def _within(solved: tuple[float, ...], bounds: tuple[float, float]) -> list[float]:
    """Return weights with which the mean of `solved` is within the bounds, or as near as it can be."""
    low, high = bounds
    inside = [float(low <= share <= high) for share in solved]
    if any(inside):
        return [weight / sum(inside) for weight in inside]
    too_hard = max((share for share in solved if share < low), default=None)
    too_easy = min((share for share in solved if share > high), default=None)
    if too_hard is None or too_easy is None:
        only = too_easy if too_hard is None else too_hard
        return [float(share == only) / solved.count(only) for share in solved]
    easy = ((low + high) / 2 - too_hard) / (too_easy - too_hard)
    mixed = {too_hard: 1 - easy, too_easy: easy}
    return [mixed.get(share, 0.0) / solved.count(share) for share in solved]
