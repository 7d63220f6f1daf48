"""What `--minutes` becomes: more time or a faster machine gives more steps, and a choice is never made anew."""

from pathlib import Path

import pytest

from liaoyuan.cli import quickstart_plan
from liaoyuan.cli.quickstart_plan import (
    FEWEST_STEPS,
    MOST_STEPS,
    ROLLOUT_EXTRAS,
    Measured,
    QuickstartConfig,
    resolve,
)
from liaoyuan.config import to_toml
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import silent
from liaoyuan.training import TrainConfig
from liaoyuan.training.pretrain import PretrainConfig
from liaoyuan.tuning import StudyConfig


def measured(factor: float = 1.0) -> Measured:
    return Measured(
        gemm_flops=1e11, training_rate=8000 * factor, update_rate=10000 * factor, generation_rate=14000 * factor
    )


def test_more_seconds_and_faster_machines_give_more_steps() -> None:
    seconds = [quickstart_plan._study(seconds, measured()).rl.steps for seconds in (10, 600, 900, 1e5)]
    assert seconds[0] == FEWEST_STEPS and seconds[3] == MOST_STEPS
    assert seconds[0] < seconds[1] < seconds[2] < seconds[3]
    assert quickstart_plan._study(600, measured(2.0)).rl.steps > seconds[1]


def test_too_little_time_cuts_supervised_fine_tuning_too() -> None:
    whole = StudyConfig()
    assert quickstart_plan._study(1, measured()).sft_steps < whole.sft_steps
    assert quickstart_plan._study(600, measured()).sft_steps == whole.sft_steps


def test_the_controls_budgets_follow_from_the_speeds_measured_here() -> None:
    prices = quickstart_plan._study(600, measured()).prices
    assert prices.updated == pytest.approx(8 / 10)
    assert prices.generated == pytest.approx(8 / 14 * ROLLOUT_EXTRAS, abs=0.001)


def test_what_was_resolved_is_read_and_not_measured_again(tmp_path: Path) -> None:
    config = QuickstartConfig(
        minutes=3.0,
        seeds=1,
        measured=measured(),
        pretrain=PretrainConfig(corpus=tmp_path / "corpus", train=TrainConfig(steps=7)),
        study=StudyConfig(),
    )
    (tmp_path / "config.toml").write_text(to_toml(config))
    nothing = None  # a corpus is needed for measuring alone
    found = resolve(tmp_path, nothing, None, 3.0, 2, silent)  # type: ignore[arg-type]
    assert found == config.model_copy(update={"seeds": 2})
    with pytest.raises(LiaoyuanError, match="--minutes"):
        resolve(tmp_path, nothing, None, 4.0, 2, silent)  # type: ignore[arg-type]
