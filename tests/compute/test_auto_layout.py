"""`layout = "auto"`: the command line finds a layout, training gets a finished one, and a resumed run keeps it."""

import tomllib
from pathlib import Path

import pytest

from liaoyuan.cli.auto_layout import find_layout, legal_counts
from liaoyuan.cli.train import train_config
from liaoyuan.device import Device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import Layout
from liaoyuan.rundir import CONFIG
from liaoyuan.training.pretrain import pretrain
from tests.compute.job import Job, losses
from tests.parallel.processes import run_verb

FEW = ("layout=auto", "plan.whole=1", "train.steps=4", "train.checkpoint_every=2")


def test_two_processes_train_on_the_layout_that_the_first_has_found(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Job(run_file, folder, "--nproc", "2", settings=FEW)
    assert first.wait() == 0, first.said
    said = [line for line in first.said.splitlines() if "layout: " in line]
    assert len(said) == 2 and "the best of" in said[0] and "a step" in said[0], first.said
    values = tomllib.loads((folder / CONFIG).read_text())
    layout = Layout.model_validate(values["layout"])
    assert layout.pp * layout.dp * layout.fsdp * layout.context * layout.tp == 2 and not values["plan"]["auto"]
    assert [step for step, _ in losses(folder)] == [0, 1, 2, 3]

    overrides = [word for setting in FEW for word in ("--set", setting)]
    again = run_verb(2, "train", run_file, "--out", folder, *overrides)
    assert "as this run began" in again[0] and tomllib.loads((folder / CONFIG).read_text()) == values


def test_what_a_run_began_with_is_kept_if_it_is_legal(run_file: Path, tmp_path: Path) -> None:
    config = train_config(run_file, ["layout=auto"], None)
    (tmp_path / "state").mkdir()
    (tmp_path / CONFIG).write_text('[layout]\nfsdp = 1\nrecompute = "full"\n[train]\nsteps = 1\nmicrobatches = 2\n')
    kept = find_layout(config, tmp_path, Device("cpu"))
    assert (kept.layout.recompute, kept.train.microbatches, kept.plan.auto) == ("full", 2, False)


def test_a_layout_of_ones_own_is_left_alone(run_file: Path, tmp_path: Path) -> None:
    config = train_config(run_file, ["layout.tp=1"], None)
    assert find_layout(config, tmp_path, Device("cpu")) is config


def test_training_itself_takes_no_auto(run_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="Training takes a layout"):
        pretrain(train_config(run_file, ["layout=auto"], None), tmp_path)


def test_a_launcher_knows_how_many_processes_can_be(run_file: Path) -> None:
    legal = legal_counts(train_config(run_file, ["layout=auto"], None))
    assert [count for count in range(1, 7) if legal(count)] == [1, 2, 4]
