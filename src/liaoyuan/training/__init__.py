"""Training: the loop that pretraining and fine-tuning share, the optimiser, the schedule, the FLOP count."""

from liaoyuan.training.loop import Stopped, TrainConfig, TrainResult, make_optimiser, stop_asked, train
from liaoyuan.training.objective import Objective
from liaoyuan.training.optimiser import AdamW

__all__ = ["AdamW", "Objective", "Stopped", "TrainConfig", "TrainResult", "make_optimiser", "stop_asked", "train"]
