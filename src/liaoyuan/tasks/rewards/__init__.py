"""What answers are worth, each reward in a file of its own; `make_reward` makes one of its name and options."""

from collections.abc import Callable
from typing import Any

from liaoyuan.config import Config, parse
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.tasks.reward import Reward
from liaoyuan.tasks.rewards.choice import ChoiceReward
from liaoyuan.tasks.rewards.code import CodeConfig, UnitTests, open_unit_tests
from liaoyuan.tasks.rewards.exact import ExactReward
from liaoyuan.tasks.rewards.form import (
    FormatConfig,
    FormatReward,
    LanguageConfig,
    LanguageReward,
    LengthConfig,
    LengthReward,
)
from liaoyuan.tasks.rewards.function import FunctionConfig, FunctionReward
from liaoyuan.tasks.rewards.judged import ModelReward, RewardModelConfig
from liaoyuan.tasks.rewards.maths import MathsConfig, MathsReward
from liaoyuan.tasks.rewards.mixture import Mixture
from liaoyuan.tasks.rewards.number import NumberConfig, NumberReward

__all__ = [
    "CHECKS",
    "REWARDS",
    "ChoiceReward",
    "ExactReward",
    "FormatReward",
    "FunctionReward",
    "LanguageReward",
    "LengthReward",
    "MathsReward",
    "Mixture",
    "ModelReward",
    "NumberReward",
    "RewardModelConfig",
    "UnitTests",
    "make_reward",
]


class NoOptions(Config):
    """Of a reward that has none."""


CHECKS: dict[str, tuple[type[Config], Callable[[Any], Reward]]] = {  # which say whether an answer is right
    "number": (NumberConfig, NumberReward),
    "maths": (MathsConfig, MathsReward),
    "choice": (NoOptions, lambda _: ChoiceReward()),
    "exact": (NoOptions, lambda _: ExactReward()),
    "code": (CodeConfig, open_unit_tests),
}
REWARDS: dict[str, tuple[type[Config], Callable[[Any], Reward]]] = CHECKS | {
    "format": (FormatConfig, FormatReward),
    "length": (LengthConfig, LengthReward),
    "language": (LanguageConfig, LanguageReward),
    "function": (FunctionConfig, FunctionReward),
    "model": (RewardModelConfig, ModelReward),
}


def make_reward(name: str, options: dict[str, Any], where: str) -> Reward:
    """Return the reward called `name`; raises LiaoyuanError, naming `where`, if it or an option is unknown."""
    if name not in REWARDS:
        raise LiaoyuanError(f"{where}: there is no reward '{name}' ({', '.join(REWARDS)}){nearest(name, REWARDS)}")
    schema, make = REWARDS[name]
    return make(parse(schema, options, where))
