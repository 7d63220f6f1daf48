"""Worked solutions of a task as records, from which a model learns how to think."""

import random
from collections.abc import Sequence

from liaoyuan.data import Record
from liaoyuan.tasks.problem import Task, to_record

SOLUTIONS = 1_000_000  # streams of worked solutions begin here, so that they are not those of rollouts
LEFT = 2  # steps that a hurried solution leaves to the head, the last ones


def solution_records(
    task: Task, levels: Sequence[int], count: int, seed: int, fast_every: int, hurried: float = 0.0
) -> list[Record]:
    """Return `count` worked solutions of training problems, evenly over the levels.

    Every `fast_every`-th problem (none if 0) is there a second time with its answer given at once, without a thought.

    hurried: share of them whose thought ends `LEFT` steps early, as people leave what is left to the head; it is
        right all the same. Which way of thinking pays is for the reward to say.
    """
    records = []
    for place in range(count):
        problem = task.problem(SOLUTIONS + seed, place, levels[place % len(levels)], "train")
        in_haste = hurried and random.Random(f"hurried/{seed}/{place}").random() < hurried
        records.append(to_record(problem, left_out=LEFT if in_haste else 0))
        if fast_every and place % fast_every == 0:
            records.append(to_record(problem, thinking=False))
    return records
