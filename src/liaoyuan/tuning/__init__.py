"""Teaching: supervised fine-tuning, reinforcement learning on checked answers, and the study that compares them.

Rollouts run in the inference engine on the very weights that are trained.
"""

from liaoyuan.tuning.finetune import finetune, worked_solutions
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.reinforce import ReinforceResult, reinforce
from liaoyuan.tuning.study import StudyConfig, study
from liaoyuan.tuning.summary import summarise
from liaoyuan.tuning.validation import Best

__all__ = [
    "Best",
    "ReinforceConfig",
    "ReinforceResult",
    "StudyConfig",
    "finetune",
    "reinforce",
    "study",
    "summarise",
    "worked_solutions",
]
