"""A training run goes on with another number of processes, and a stage of a pipeline has its own names only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from liaoyuan.checkpoint.reading import read_manifest
from liaoyuan.checkpoint.training_state import load_state, save_state
from liaoyuan.models import Decoder, ModelConfig
from liaoyuan.parallel import World
from liaoyuan.rundir import read_metrics
from liaoyuan.training import AdamW, TrainConfig
from tests.checkpoint.layouts import Spread, spread
from tests.checkpoint.processes import exit_codes, together
from tests.parallel import worker

SETTINGS = TrainConfig(steps=6, warmup_steps=2, checkpoint_every=2, learning_rate=0.01)


def run(world: World, folder: Path, config: ModelConfig, die_at: int | None = None) -> None:
    worker.main(folder, SETTINGS, config, world, die_at)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, after: int, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    run(World(), tmp_path / "whole", tiny_config)
    assert exit_codes(before, run, tmp_path / "changed", tiny_config, 5) != [0] * before
    together(after, run, tmp_path / "changed", tiny_config)
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


@dataclass
class Stage:
    """The layers of a model that one process of a pipeline has, under the names of the whole."""

    whole: Decoder
    rank: int

    @property
    def config(self) -> ModelConfig:
        return self.whole.config

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        own = f"layers.{self.rank}."
        return [
            (name, parameter)
            for name, parameter in self.whole.named_parameters()
            if name.startswith(own) or (self.rank == 1 and not name.startswith("layers."))
        ]


def stage(config: ModelConfig, rank: int) -> Spread:
    whole = spread("", config, World())
    model: Any = Stage(whole.model, rank)
    return Spread(model, AdamW(model.named_parameters()), whole.cut)


def save_stage(world: World, folder: Path, config: ModelConfig) -> None:
    made = stage(config, world.rank)
    made.fill()
    save_state(folder, 1, made.model, made.optimiser, {}, world)


def load_stage(world: World, folder: Path, config: ModelConfig) -> None:
    made = stage(config, world.rank)
    assert load_state(folder, made.model, made.optimiser, world) == (1, {})
    made.assert_filled()


def test_stages_of_a_pipeline_make_one_state_and_load_their_parts_of_it(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    together(2, save_stage, tmp_path, tiny_config)
    assert len(read_manifest(tmp_path / "step-000001")["files"]) == 2
    whole = spread("", tiny_config, World())
    assert load_state(tmp_path, whole.model, whole.optimiser) == (1, {})
    whole.assert_filled()
    together(2, load_stage, tmp_path, tiny_config)
