"""Problems with checkable answers, generated afresh: one meaning of "right" for tuning and evaluation.

Training, validation and test problems are disjoint by construction: a hash of the question decides the split.
"""

from collections.abc import Sequence

from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.tasks.addition import Addition
from liaoyuan.tasks.countdown import Countdown
from liaoyuan.tasks.modular import Modular
from liaoyuan.tasks.problem import Problem, Score, Split, Task, held_out_problems, split_of, spread, to_record
from liaoyuan.tasks.reward import Reward, Right, Rollout

TASKS: dict[str, Task] = {task.name: task for task in (Addition(), Modular(), Countdown())}

__all__ = [
    "TASKS",
    "Problem",
    "Reward",
    "Right",
    "Rollout",
    "Score",
    "Split",
    "Task",
    "check_levels",
    "find_task",
    "held_out_problems",
    "split_of",
    "spread",
    "to_record",
]


def find_task(name: str) -> Task:
    """Return the task called `name`; raises LiaoyuanError that names the nearest one."""
    if name not in TASKS:
        raise LiaoyuanError(f"There is no task '{name}' ({', '.join(TASKS)} exist){nearest(name, TASKS)}")
    return TASKS[name]


def check_levels(task: Task, levels: Sequence[int], where: str) -> None:
    """Raise LiaoyuanError, naming the setting `where`, if there are no levels or one that the task does not have."""
    wrong = [level for level in levels if level not in task.levels]
    if wrong or not levels:
        known = f"{task.levels[0]} to {task.levels[-1]}"
        raise LiaoyuanError(f"{where}: {task.name} has the levels {known}, not {wrong[0] if wrong else 'none'}.")
