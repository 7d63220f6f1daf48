"""A study of several seeds: more can follow, other settings are refused, and each seed is a study of its own."""

from pathlib import Path

import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, read_json
from liaoyuan.tuning.study_run import StudyRunConfig, run_study
from liaoyuan.tuning.summary import curves
from tests.tuning.test_study import CONFIG

QUICK = CONFIG.model_copy(update={"scratch": False, "sft_steps": 4})


def test_seeds_can_be_added_and_settings_cannot_change(model_folder: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    config = StudyRunConfig(model=model_folder, study=QUICK, seeds=1)
    first = run_study(config, tmp_path / "run", told.append)
    assert told[-1].done == told[-1].total == 1000
    (note,) = {progress.note for progress in told if progress.note}
    assert note.startswith("seed 0: warning: SFT has left little for RL to choose at level 1")
    second = run_study(config.model_copy(update={"seeds": 2}), tmp_path / "run")
    assert second["seeds"] == 2 and len(second["difference_by_seed"]["greedy"]) == 2
    assert second["difference_by_seed"]["greedy"][0] == first["difference_by_seed"]["greedy"][0]
    assert read_json(tmp_path / "run" / "summary.json") == second
    assert all((tmp_path / "run" / path).exists() for path in second["metrics"]["rl"])
    last = run_study(config.model_copy(update={"first_seed": 1}), tmp_path / "run")
    assert last["difference_by_seed"]["greedy"] == second["difference_by_seed"]["greedy"][1:]
    more_processes = QUICK.model_copy(update={"workers": 1})
    assert run_study(config.model_copy(update={"study": more_processes}), tmp_path / "run")["seeds"] == 1
    with pytest.raises(LiaoyuanError, match=r"study\.sft_steps = 4, not 5"):
        run_study(config.model_copy(update={"study": QUICK.model_copy(update={"sft_steps": 5})}), tmp_path / "run")


def test_a_study_that_was_moved_goes_on(model_folder: Path, tmp_path: Path) -> None:
    """What is missing is measured with the models where they are now."""
    config = StudyRunConfig(model=model_folder, study=QUICK, seeds=1)
    first = run_study(config, tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    (moved / "seed-0" / "measured" / "rl" / "done.json").unlink()
    second = run_study(config, moved)
    assert second == first
    assert str(tmp_path / "run") not in (moved / "seed-0" / "study.json").read_text()


def test_a_folder_whose_studies_lie_elsewhere_is_told_what_to_do(tmp_path: Path) -> None:
    one = {"stages": {"rl": {"model": str(tmp_path / "old" / "seed-0" / "rl" / "1" / "best")}}}
    assert curves(tmp_path / "old", [one], "rl") == ["seed-0/rl/1/metrics.jsonl"]
    with pytest.raises(LiaoyuanError, match=r"new was moved: .*/old/seed-0/rl/1.* Move it back, or begin again"):
        curves(tmp_path / "new", [one], "rl")
