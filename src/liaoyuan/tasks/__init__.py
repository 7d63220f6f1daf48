"""Problems with checkable answers, and what answers are worth: one meaning of "right" for tuning and evaluation.

Training, validation and test problems are disjoint by construction: a hash of the question decides the split.
"""

from liaoyuan.tasks.catalogue import TASKS, check_levels, find_task
from liaoyuan.tasks.generated import WORDINGS, Wording
from liaoyuan.tasks.held_out import measured_problems
from liaoyuan.tasks.problem import Problem, Score, Split, Task, held_out_problems, split_of, spread, to_record
from liaoyuan.tasks.reward import BatchedReward, Reward, Right, Rollout, score_all
from liaoyuan.tasks.solutions import solution_records
from liaoyuan.tasks.task_file import Assignment, open_task

__all__ = [
    "TASKS",
    "WORDINGS",
    "Assignment",
    "BatchedReward",
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
    "measured_problems",
    "open_task",
    "score_all",
    "solution_records",
    "split_of",
    "spread",
    "to_record",
]
