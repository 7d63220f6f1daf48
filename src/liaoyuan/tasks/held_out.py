"""The test problems of a task of any kind, each one once."""

from collections.abc import Sequence

from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks.data_task import DataTask
from liaoyuan.tasks.parts import Part, PartsTask
from liaoyuan.tasks.problem import Problem, Task, held_out_problems


def measured_problems(task: Task, levels: Sequence[int], count: int) -> list[Problem]:
    """Return at most `count` different test problems, evenly over the levels, the same for every model.

    Of problems that come from files there are all, if they are no more than `count`.

    Raises:
        LiaoyuanError: a level has no test problem.
    """
    parts = task.parts if isinstance(task, PartsTask) else (Part(task, tuple(levels)),)
    files = [(part.task, level) for part in parts for level in levels if level in part.levels]
    for level in levels:
        if not any(part.has(level, "test") for part in parts if level in part.levels):
            raise LiaoyuanError(f"{task.name} has no test problem of level {level}.")
    if all(isinstance(one, DataTask) for one, _ in files):
        whole = [found for one, level in files if isinstance(one, DataTask) for found in one.all(level, "test")]
        if len(whole) <= count:
            return whole
    found = {problem.key: problem for problem in held_out_problems(task, levels, count)}
    return list(found.values())
