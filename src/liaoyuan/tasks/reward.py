"""What an answer is worth: a reward reads a rollout and gives a score, with what it read and why.

`Right` is the reward of tasks themselves; evaluation counts what it calls right, and nothing else.
"""

from dataclasses import dataclass
from typing import Protocol

from liaoyuan.tasks.problem import Problem, Score, Task


@dataclass(frozen=True)
class Rollout:
    """An answer to a problem: its thought, and the text after it, without what ends the turn.

    flaw: why it is no whole answer ("cut off", say); empty if it is. length: its tokens.
    """

    problem: Problem
    thought: str
    text: str
    flaw: str = ""
    length: int = 0


class Reward(Protocol):
    """Gives a score to a rollout."""

    @property
    def name(self) -> str: ...

    def __call__(self, rollout: Rollout) -> Score: ...


@dataclass(frozen=True)
class Right:
    """1 for a whole answer that the task calls right, else 0; no value where the task cannot tell."""

    task: Task

    @property
    def name(self) -> str:
        return "right"

    def __call__(self, rollout: Rollout) -> Score:
        if rollout.flaw:
            return Score(0.0, None, rollout.flaw)
        return self.task.check(rollout.problem, rollout.text)
