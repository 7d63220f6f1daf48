"""A task made of parts: each level is drawn from the parts that have it, in proportion to their weights."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks.problem import Problem, Score, Split, Task


@dataclass(frozen=True)
class Part:
    """A task, the levels of it that are used, and how often it is drawn beside the others."""

    task: Task
    levels: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class PartsTask:
    """Several tasks as one. A problem keeps the name of the task that made it, which also judges its answers."""

    name: str
    parts: tuple[Part, ...]
    levels: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        levels = {level for part in self.parts for level in part.levels}
        object.__setattr__(self, "levels", tuple(sorted(levels)))

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        parts = [part for part in self.parts if level in part.levels]
        if not parts:
            raise LiaoyuanError(f"{self.name} has no level {level}.")
        chance = random.Random(f"part/{self.name}/{seed}/{index}/{level}/{split}")
        part = chance.choices(parts, [part.weight for part in parts])[0]
        return part.task.problem(seed, index, level, split)

    def check(self, problem: Problem, text: str) -> Score:
        for part in self.parts:
            if part.task.name == problem.task:
                return part.task.check(problem, text)
        return Score(None, None, f"{self.name} has no part '{problem.task}'")
