"""Plans of customising a model: what fine-tuning, preferences and reinforcement learning hold and take."""

from liaoyuan.compute.plan.tuning.dry_tune import TuneJob, dry_tune
from liaoyuan.compute.plan.tuning.learn import LearnPlan, Records, plan_learning, priced, steps_of
from liaoyuan.compute.plan.tuning.measured import measure_updates
from liaoyuan.compute.plan.tuning.rl import Phases, RlJob, RlPlan, RlPlanner, Split, splits
from liaoyuan.compute.plan.tuning.update_price import Scale, Update, UpdatePrice

__all__ = [
    "LearnPlan",
    "Phases",
    "Records",
    "RlJob",
    "RlPlan",
    "RlPlanner",
    "Scale",
    "Split",
    "TuneJob",
    "Update",
    "UpdatePrice",
    "dry_tune",
    "measure_updates",
    "plan_learning",
    "priced",
    "splits",
    "steps_of",
]
