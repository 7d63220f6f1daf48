"""Several rewards as one: their weighted sum."""

from collections.abc import Sequence
from dataclasses import dataclass

from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Reward, Rollout, score_all


@dataclass(frozen=True)
class Mixture:
    """The sum of each reward's value times its weight; what was read is what the first of them read.

    Where one part has no value, the whole has none: rollouts of one problem are compared with each other, and a sum
    of fewer parts is no smaller reward but another one.
    """

    parts: tuple[tuple[Reward, float], ...]
    name: str = "mixture"

    def __call__(self, rollout: Rollout) -> Score:
        return self.score_all([rollout])[0]

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        columns = score_all([reward for reward, _ in self.parts], rollouts)
        return [self._sum(scores) for scores in zip(*columns, strict=True)]

    def _sum(self, scores: Sequence[Score]) -> Score:
        words = []
        for (reward, _), score in zip(self.parts, scores, strict=True):
            value = "not judged" if score.value is None else f"{score.value:.3g}"
            words.append(f"{reward.name} {value}" + (f" ({score.reason})" if score.reason else ""))
        values = [
            None if one.value is None else one.value * weight
            for one, (_, weight) in zip(scores, self.parts, strict=True)
        ]
        known = [value for value in values if value is not None]
        total = sum(known) if len(known) == len(values) else None
        return Score(total, scores[0].parsed, "; ".join(words))
