"""The settings of preference tuning, and what of them follows from the method."""

from pathlib import Path
from typing import Any

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import Layout
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.lora import LoraConfig, Method
from liaoyuan.tuning.preference_comparison import Questions
from liaoyuan.tuning.preference_objective import PreferenceLoss
from liaoyuan.tuning.start import Start, refuse_whole

RATE, CONTROL_RATE = 1e-5, 4e-4  # where none is given, and ADAPTERS times as much where adapters alone are trained
ADAPTERS = 10.0  # as published recipes for DPO have it: 5e-7 of whole weights, 5e-6 of adapters


class PreferenceTrain(TrainConfig):
    """The section `[train]`. learning_rate: 0 is 1e-5, of adapters 1e-4."""

    steps: int = Field(300, gt=0)
    learning_rate: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)


class PreferenceConfig(Config):
    """`model` to begin with, judged answers to learn from (`data`), the loss, how to train, what to measure.

    method: "full" trains every weight, "lora", "rslora" and "dora" adapters alone.
    held_out: answers to measure on; without it, a share of the prompts of `data` is not learned from.
    control: also fine-tune on the chosen answers for the same compute, and measure that.
    """

    model: Path
    data: Path
    held_out: Path | None = None
    held_out_share: float = Field(0.1, gt=0, lt=1)
    skip_bad: bool = False  # learn from the good records of a file that has bad ones
    preference: PreferenceLoss = PreferenceLoss()
    method: Method = "full"
    lora: LoraConfig = LoraConfig()
    train: PreferenceTrain = PreferenceTrain()
    layout: Layout = Layout()
    sequence_length: int = Field(1024, gt=0)  # of the rows into which answers are packed, the two of a pair together
    skip_long: bool = False  # whether records that do not fit in a row are left out
    control: bool = False
    control_learning_rate: float = Field(0.0, ge=0)  # 0: 4e-4, of adapters 4e-3
    ask: Questions = Questions()
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen

    @property
    def start(self) -> Start:
        return Start(self.model, self.method, self.lora, self.train.seed)


def resolved(config: PreferenceConfig) -> PreferenceConfig:
    """Return the config with what follows from the method.

    Raises:
        LiaoyuanError: a setting does not go with adapters.
    """
    filled: dict[str, Any] = {}
    factor = ADAPTERS if config.start.has_adapters else 1.0
    if not config.train.learning_rate:
        filled["learning_rate"] = RATE * factor
    if config.start.has_adapters:
        refuse_whole(config.train.optimiser, master_dtype=config.train.master_dtype)
        filled["balance_rate"] = 0.0  # it would move the base's routers
    control = config.control_learning_rate or CONTROL_RATE * factor
    return config.model_copy(update={"train": config.train.model_copy(update=filled), "control_learning_rate": control})


def check(config: PreferenceConfig) -> None:
    """Refuse what a loss of whole answers cannot be computed with.

    Raises:
        LiaoyuanError: see above.
    """
    layout = config.layout
    if config.ask.task:
        _ = config.ask.chosen
    if layout.pp > 1 or layout.context > 1:
        raise LiaoyuanError(
            f"The layout {layout.describe()} does not fit: a preference is a loss of whole answers, which pp and cp "
            "cut. Use fsdp, dp, tp and ep."
        )
    if config.train.penalties:
        raise LiaoyuanError(
            "train.z_loss and train.label_smoothing belong to the cross-entropy, which is not what is learned here: "
            "leave them 0 (preference.label_smoothing is that of DPO)."
        )
