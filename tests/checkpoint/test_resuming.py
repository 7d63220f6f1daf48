"""A training run goes on with another number of processes, and a stage of a pipeline has its own names only."""

from pathlib import Path

import pytest

from liaoyuan.checkpoint.reading import read_manifest
from liaoyuan.checkpoint.training_state import load_state, save_state
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import Program, World
from liaoyuan.parallel.pipeline import stage_of
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


def stage(config: ModelConfig, rank: int) -> Spread:
    whole = spread("", config, World())
    program = Program([stage_of(whole.model, rank, [range(1), range(1, 2)])])  # type: ignore[arg-type]
    return Spread(program, AdamW(program.named_parameters()), whole.cut)


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
