"""A reward from a reward model: what it thinks of the question with the answer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from liaoyuan.tasks.problem import Score
from liaoyuan.tasks.reward import Rollout


class RewardModel(Protocol):
    """A model that gives a value to texts, higher for better ones."""

    def value(self, texts: Sequence[str]) -> list[float]: ...


@dataclass(frozen=True)
class ModelReward:
    """The value that a reward model gives to question and answer, the thought left out; all in one batch.

    render: makes of a rollout the text that the model was trained on. An answer that is not whole has no value, since
        no text for the model is there; a reward of its own (format, length) says what that costs.
    """

    model: RewardModel
    render: Callable[[Rollout], str] = lambda rollout: f"{rollout.problem.question}\n\n{rollout.text}"
    name: str = "model"

    def __call__(self, rollout: Rollout) -> Score:
        return self.score_all([rollout])[0]

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        values = self.model.value([self.render(rollout) for rollout in rollouts]) if rollouts else []
        if len(values) != len(rollouts):
            raise ValueError(f"the reward model gave {len(values)} values for {len(rollouts)} texts")
        return [
            Score(float(value)) if math.isfinite(value) else Score(None, None, f"the model's value is {value}")
            for value in values
        ]
