"""What an answer is worth: a reward reads a rollout and gives a score, with what it read and why.

`Right` is the reward of tasks themselves; evaluation counts what it calls right, and nothing else. The other rewards
are in `rewards/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from liaoyuan.tasks.problem import Problem, Score, Task


@dataclass(frozen=True)
class Rollout:
    """An answer to a problem: its thought, and the text after it, without what ends the turn.

    flaw: why it is no whole answer ("cut off", say); empty if it is. length: its tokens; thought_length: of these,
        the thought's.
    """

    problem: Problem
    thought: str
    text: str
    flaw: str = ""
    length: int = 0
    thought_length: int = 0


class Reward(Protocol):
    """Gives a score to a rollout."""

    @property
    def name(self) -> str: ...

    def __call__(self, rollout: Rollout) -> Score: ...


@runtime_checkable
class BatchedReward(Protocol):
    """A reward that judges many rollouts faster together than one by one."""

    @property
    def name(self) -> str: ...

    def __call__(self, rollout: Rollout) -> Score: ...

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]: ...


def score_all(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> list[list[Score]]:
    """Return for each reward the scores of all rollouts, in their order; what a reward gives does not depend on it."""
    return [
        reward.score_all(rollouts) if isinstance(reward, BatchedReward) else [reward(one) for one in rollouts]
        for reward in rewards
    ]


@runtime_checkable
class BatchedTask(Protocol):
    """A task that judges many texts faster together than one by one."""

    def check_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Score]: ...


def check_all(task: Task, pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
    """Return what the task says of each text."""
    if isinstance(task, BatchedTask):
        return task.check_all(pairs)
    return [task.check(problem, text) for problem, text in pairs]


@dataclass(frozen=True)
class Right:
    """1 for a whole answer that the task calls right, else 0; no value where the task cannot tell."""

    task: Task

    @property
    def name(self) -> str:
        return "right"

    def __call__(self, rollout: Rollout) -> Score:
        return self.score_all([rollout])[0]

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        whole = [rollout for rollout in rollouts if not rollout.flaw]
        scores = iter(check_all(self.task, [(rollout.problem, rollout.text) for rollout in whole]))
        return [Score(0.0, None, rollout.flaw) if rollout.flaw else next(scores) for rollout in rollouts]
