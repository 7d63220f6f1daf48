"""The whole study on a tiny model: every figure is there, the controls are paid, and a killed study goes on."""

from pathlib import Path

import numpy as np
import pytest

from liaoyuan.rundir import Progress, read_json, write_json
from liaoyuan.tuning import ReinforceConfig, StudyConfig, study, summarise
from liaoyuan.tuning.jobs import Job, run_jobs
from liaoyuan.tuning.stages import Lesson

CONFIG = StudyConfig(
    lesson=Lesson(levels=(1,), solutions=12, validation_problems=6, problems=10, samples=2, max_tokens=12),
    rl=ReinforceConfig(levels=(1,), steps=4, problems=4, group=4, max_tokens=12, validate_every=2),
    sft_steps=30,
    sft_learning_rate=1e-2,
    batch_tokens=256,
    rl_learning_rates=(1e-4, 2e-4),
    control_learning_rates=(1e-4, 1e-3),
    trial=0.5,
    workers=0,
)


def test_a_killed_study_goes_on_and_ends_the_same(model_folder: Path, tmp_path: Path) -> None:
    whole = study(CONFIG, model_folder, tmp_path / "whole")

    def kill(progress: Progress) -> None:
        if progress.done > 400 and not (tmp_path / "was killed").exists():
            (tmp_path / "was killed").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(CONFIG, model_folder, tmp_path / "killed", kill)
    resumed = study(CONFIG, model_folder, tmp_path / "killed")
    assert resumed["measured"] == whole["measured"]
    assert read_json(tmp_path / "killed/study.json")["measured"] == whole["measured"]
    for stage in ("sft", "rl", "control", "control_own_samples", "scratch"):
        weights = [Path(result["stages"][stage]["model"]) / "model.safetensors" for result in (whole, resumed)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), stage
    _check_summary(summarise([whole, resumed]))
    _check_budgets(whole)


def _check_summary(found: dict) -> None:  # type: ignore[type-arg]
    for stage in ("sft", "rl", "control", "control_own_samples", "fast", "scratch", "difference"):
        for measure in ("greedy", "sampled", "pass_at_8"):
            value = found["accuracy"][stage][measure]
            assert value["low"] <= value["mean"] <= value["high"]
    assert found["seeds"] == 2 and found["problems"] == 10
    assert found["compute"]["control"]["flops"] > 0
    assert len(found["difference_by_seed"]["greedy"]) == 2
    assert found["samples"][0].keys() == {"question", "answer", "before", "after", "before_right", "after_right"}


def _check_budgets(result: dict) -> None:  # type: ignore[type-arg]
    """The controls get at least RL's compute in FLOPs, rollouts and sampling included."""
    stages = result["stages"]
    assert stages["control"]["flops"] >= stages["rl"]["flops"]
    own = stages["control_own_samples"]["flops"] + stages["own_samples"]["flops"]
    assert own >= 0.99 * stages["rl"]["flops"]


def test_the_difference_is_to_the_better_control() -> None:
    def fake(rl: float, control: float, own: float) -> dict:  # type: ignore[type-arg]
        def of(share: float) -> dict:  # type: ignore[type-arg]
            right = (np.arange(100) < 100 * share).astype(int).tolist()
            rest = {"levels": [1] * 100, "thought_lengths": list(range(100)), "shown": []}
            return {"greedy": right, "sampled": right, "pass_at_8": right, **rest}

        measured = {"sft": of(0.1), "rl": of(rl), "control": of(control), "control_own_samples": of(own)}
        cost = {"cpu_seconds": 1.0, "flops": 1.0, "tokens": 1, "generated_tokens": 1, "rollout_seconds": 1.0}
        return {"measured": measured, "stages": dict.fromkeys((*measured, "own_samples"), cost)}

    found = summarise([fake(0.9, 0.4, 0.6), fake(0.8, 0.7, 0.6)])
    assert found["difference_by_seed"]["greedy"] == pytest.approx([0.3, 0.1])
    assert found["accuracy"]["difference"]["greedy"]["mean"] == pytest.approx(0.85 - 0.6)


def add(folder: Path, report: object, number: int) -> dict[str, int]:
    if number < 0:
        raise ValueError("negative")
    return {"sum": number + 1}


def test_jobs_in_processes_give_results_in_order_and_are_not_repeated(tmp_path: Path) -> None:
    jobs = [Job(str(n), tmp_path / str(n), add, {"number": n}) for n in range(3)]
    write_json(tmp_path / "1" / "done.json", {"sum": 100})
    assert [result["sum"] for result in run_jobs(jobs, workers=2)] == [1, 100, 3]
    with pytest.raises(ValueError, match="negative"):
        run_jobs([Job("bad", tmp_path / "bad", add, {"number": -1})], workers=0)
