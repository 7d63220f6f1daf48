"""Which levels of difficulty reinforcement learning is given: those whose groups teach most now.

A group teaches something if its samples are not all right and not all wrong, so each level is drawn in proportion to
the share of its recent groups that did (learnability: Tzannetos et al. 2023, arXiv 2304.12877; Foster and Foerster
2025, arXiv 2502.12272). As the model improves, the levels that are drawn become harder by themselves.
"""

import random
from collections.abc import Sequence

MEMORY = 0.05  # weight of a new group in its level's share: about the last twenty groups count
FLOOR = 0.1  # share that a level is taken to have at least, so that one which was too hard is tried again


def draw_levels(signal: Sequence[float], levels: Sequence[int], count: int, seed: str) -> list[int]:
    """Return the levels of `count` problems; signal[i] in [0, 1] is the share of groups of levels[i] that teach."""
    return random.Random(seed).choices(levels, [max(FLOOR, share) for share in signal], k=count)


def follow(
    signal: Sequence[float], levels: Sequence[int], drawn: Sequence[int], taught: Sequence[bool]
) -> tuple[float, ...]:
    """Return the shares after groups of the levels `drawn`, each of which taught something or not."""
    shares = dict(zip(levels, signal, strict=True))
    for level, useful in zip(drawn, taught, strict=True):
        shares[level] += MEMORY * (useful - shares[level])
    return tuple(shares[level] for level in levels)
