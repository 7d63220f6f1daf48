"""Problems with checkable answers, generated afresh: one meaning of "right" for tuning and evaluation.

Training, validation and test problems are disjoint by construction: a hash of the question decides the split.
"""

from liaoyuan.tasks.catalogue import TASKS, check_levels, find_task
from liaoyuan.tasks.generated import WORDINGS, Wording
from liaoyuan.tasks.problem import Problem, Score, Split, Task, held_out_problems, split_of, spread, to_record
from liaoyuan.tasks.reward import Reward, Right, Rollout
from liaoyuan.tasks.solutions import solution_records

__all__ = [
    "TASKS",
    "WORDINGS",
    "Problem",
    "Reward",
    "Right",
    "Rollout",
    "Score",
    "Split",
    "Task",
    "Wording",
    "check_levels",
    "find_task",
    "held_out_problems",
    "solution_records",
    "split_of",
    "spread",
    "to_record",
]
