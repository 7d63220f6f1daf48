"""How often a reward is wrong: false negatives and false positives on answers of which it is known what they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from liaoyuan.evaluation.intervals import Interval
from liaoyuan.tasks import Reward, Score, score_all
from liaoyuan.tasks.rewards.cases import Case

Z = 1.96  # of a 95% interval


@dataclass(frozen=True)
class Rate:
    """Of `count` answers made in one way, how many the reward got wrong, and how many it did not judge."""

    way: str
    right: bool
    count: int
    wrong: int
    unjudged: int

    @property
    def interval(self) -> Interval:
        """The share that is wrong among those judged, by Wilson's score interval (1927): not empty where none is."""
        return wilson(self.wrong, self.count - self.unjudged)


@dataclass(frozen=True)
class Rates:
    """Rates by way, and the cases that the reward got wrong or did not judge, with its scores."""

    rates: tuple[Rate, ...]
    wrong: tuple[tuple[Case, Score], ...]
    unjudged: tuple[tuple[Case, Score], ...]

    def whole(self, right: bool) -> Rate:
        """Return the rate over all ways of right answers (false negatives), or of wrong ones (false positives)."""
        found = [rate for rate in self.rates if rate.right == right]
        counts = (sum(getattr(rate, name) for rate in found) for name in ("count", "wrong", "unjudged"))
        return Rate("all", right, *counts)


def rates_of(reward: Reward, cases: Sequence[Case], threshold: float = 1.0) -> Rates:
    """Judge the cases; an answer is taken for right from a value of `threshold` on."""
    scores = score_all([reward], [case.rollout for case in cases])[0]
    counts: dict[tuple[bool, str], list[int]] = {}
    wrong, unjudged = [], []
    for case, score in zip(cases, scores, strict=True):
        entry = counts.setdefault((case.right, case.way), [0, 0, 0])
        entry[0] += 1
        if score.value is None:
            entry[2] += 1
            unjudged.append((case, score))
        elif (score.value >= threshold) != case.right:
            entry[1] += 1
            wrong.append((case, score))
    rates = (Rate(way, right, *found) for (right, way), found in counts.items())
    return Rates(tuple(sorted(rates, key=lambda rate: not rate.right)), tuple(wrong), tuple(unjudged))


def wilson(hits: int, count: int) -> Interval:
    """Return the share with its interval; of nothing, from 0 to 1."""
    if not count:
        return Interval(0.0, 0.0, 1.0)
    share = hits / count
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, max(0.0, middle - reach), min(1.0, middle + reach))
