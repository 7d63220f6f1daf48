"""The settings of supervised fine-tuning, and what of them follows from the model and the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.data import RecordBatches, TokenisedRecord
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import Layout
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.lora import LoraConfig, Method
from liaoyuan.tuning.rates import learning_rate_for
from liaoyuan.tuning.start import Start, refuse_whole

FEWEST_STEPS = 20  # where `epochs` say how many: fewer move nothing
EVALUATIONS = 10  # in a whole run, where `train.evaluate_every` is not given
WARMUP = 0.05  # share of the steps, at most the loop's own number


class SftTrain(TrainConfig):
    """The section `[train]`. steps: 0 is as many as `epochs` need; learning_rate: 0 follows from the model's size."""

    steps: int = Field(0, ge=0)
    learning_rate: float = Field(0.0, ge=0)


class SftConfig(Config):
    """`model` to begin with, `data` to learn (examples in any known layout), how to train, on which device.

    method: "full" trains every weight, "lora", "rslora" and "dora" adapters alone.
    validation: a file of held-out examples; without it `validation_share` of the data is held out, by content.
    replay: examples of general text, of which so much is mixed in that it makes `replay_share` of the tokens.
    keep: the checkpoint with the lowest held-out loss, or the last one.
    """

    model: Path
    data: Path
    skip_bad: bool = False  # learn from the good records of a file that has bad ones, or too long ones
    method: Method = "full"
    lora: LoraConfig = LoraConfig()
    validation: Path | None = None
    validation_share: float = Field(0.05, ge=0, lt=1)
    validation_records: int = Field(400, gt=0)  # at most so many
    replay: Path | None = None
    replay_share: float = Field(0.1, gt=0, lt=1)
    keep: Literal["best", "last"] = "best"
    epochs: float = Field(3.0, gt=0)
    train: SftTrain = SftTrain()
    layout: Layout = Layout()
    sequence_length: int = Field(512, gt=0)  # of the rows into which records are packed; no record may be longer
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen

    @property
    def start(self) -> Start:
        return Start(self.model, self.method, self.lora, self.train.seed)

    @property
    def can_measure(self) -> bool:
        """Whether held-out records can be measured: that needs whole layers, sequences and vocabulary in a process."""
        return self.layout.tp * self.layout.pp * self.layout.context * self.layout.ep == 1


def resolved(config: SftConfig, model: ModelConfig, records: Sequence[TokenisedRecord]) -> SftConfig:
    """Return the config with every setting of `[train]` that follows from the model and the data filled in.

    Raises:
        LiaoyuanError: a setting does not go with adapters.
    """
    train, given = config.train, config.train.model_fields_set
    filled: dict[str, Any] = {}
    if not train.steps:
        batches = RecordBatches(records, train.seed, train.batch_tokens, config.sequence_length)
        filled["steps"] = max(FEWEST_STEPS, batches.steps_for(config.epochs))
    steps = filled.get("steps", train.steps)
    if not train.learning_rate:
        filled["learning_rate"] = learning_rate_for(model.num_parameters(), config.method)
    if "warmup_steps" not in given:
        filled["warmup_steps"] = min(train.warmup_steps, int(WARMUP * steps))
    if "evaluate_every" not in given:
        filled["evaluate_every"] = max(1, steps // EVALUATIONS)
    if "weight_decay" not in given:  # decay would pull adapters to where they began, and whole weights to zero
        filled["weight_decay"] = 0.0 if config.start.has_adapters else 0.01
    if config.start.has_adapters:
        refuse_whole(train.optimiser, master_dtype=train.master_dtype)
        filled["balance_rate"] = 0.0  # it would move the base's routers
    return config.model_copy(update={"train": train.model_copy(update=filled)})
