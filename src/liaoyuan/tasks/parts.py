"""A task made of parts: each level is drawn from the parts that have it, in proportion to their weights."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks.data_task import DataTask
from liaoyuan.tasks.problem import Problem, Score, Split, Task
from liaoyuan.tasks.reward import check_all


@dataclass(frozen=True)
class Part:
    """A task, the levels of it that are used, and how often it is drawn beside the others."""

    task: Task
    levels: tuple[int, ...]
    weight: float = 1.0

    def has(self, level: int, split: Split) -> bool:
        """Whether there are problems; a generator never ends."""
        return not isinstance(self.task, DataTask) or self.task.count(level, split) > 0


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
        parts = [part for part in self.parts if level in part.levels and part.has(level, split)]
        if not parts and level in self.levels:
            raise LiaoyuanError(f"{self.name} has no {split} problem of level {level}.")
        if not parts:
            raise LiaoyuanError(f"{self.name} has no level {level}.")
        chance = random.Random(f"part/{self.name}/{seed}/{index}/{level}/{split}")
        part = chance.choices(parts, [part.weight for part in parts])[0]
        return part.task.problem(seed, index, level, split)

    def check(self, problem: Problem, text: str) -> Score:
        return self.check_all([(problem, text)])[0]

    def check_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
        """Judge many texts, those of each part together."""
        scores = [Score(None, None, f"{self.name} has no such part")] * len(pairs)
        for part in {part.task.name: part for part in self.parts}.values():
            places = [place for place, (problem, _) in enumerate(pairs) if problem.task == part.task.name]
            for place, score in zip(places, check_all(part.task, [pairs[place] for place in places]), strict=True):
                scores[place] = score
        return scores
