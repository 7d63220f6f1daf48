"""A run ends with what it has gained: its result beside the model that it began with, on the same test problems."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model
from liaoyuan.cli.tune import app
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, read_json, read_metrics, write_json
from liaoyuan.tasks import Right, find_task, held_out_problems
from liaoyuan.tasks.seen import Seen
from liaoyuan.tuning import ReinforceConfig
from liaoyuan.tuning.gain import Exam, gain
from liaoyuan.tuning.rl_run import RlConfig, run_rl

RUNNER = CliRunner()
FEW = ReinforceConfig(levels=(1,), steps=2, problems=2, group=2, max_tokens=6, checkpoint_every=1)
LATE = FEW.model_copy(update={"checkpoint_every": 9})  # its first state is that of the end


def test_differences_are_paired_and_what_was_measured_is_not_asked_again(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = find_task("addition")
    exam = Exam(Right(task), held_out_problems(task, (1,), 6), samples=2, max_tokens=4)
    before = {"greedy": [1, 0, 0, 1, 0, 0], "sampled": [0.5] * 6, "pass_at_2": [1] * 6, "thought_tokens": [3] * 6}
    after = {"greedy": [1, 1, 1, 1, 0, 0], "sampled": [1.0] * 6, "pass_at_2": [1] * 6, "thought_tokens": [5] * 6}
    write_json(tmp_path / "measured" / "start.json", before)
    write_json(tmp_path / "measured" / "model.json", after)
    models = {name: partial(load_model, tmp_path / "nowhere") for name in ("start", "model")}
    found = gain(exam, models, tokenizer, tmp_path)
    assert [found[name]["greedy"]["mean"] for name in models] == pytest.approx([2 / 6, 4 / 6])
    assert found["difference"]["greedy"]["mean"] == pytest.approx(np.mean([0, 1, 1, 0, 0, 0]))
    assert found["difference"]["sampled"] == {"mean": 0.5, "low": 0.5, "high": 0.5}  # no problem differs from another
    assert 0.0 <= found["difference"]["greedy"]["low"] < 1 / 3 < found["difference"]["greedy"]["high"]
    (tmp_path / "measured" / "model.json").unlink()
    shares = list[int]()
    found = gain(
        exam,
        models | {"model": partial(load_model, model_folder)},
        tokenizer,
        tmp_path,
        lambda p: shares.append(p.done),
    )
    assert found["model"]["greedy"]["mean"] == 0.0  # a random model
    assert min(shares) >= 500 and shares[-1] == 1000


def test_a_run_that_makes_nothing_better_ends_with_the_model_it_began_with(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RlConfig(model=model_folder, rl=FEW, validation_problems=4, test_problems=4, test_samples=2, device="cpu")

    def kill(progress: Progress) -> None:
        if progress.unit == "step" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rl(config, tmp_path / "run", kill)
    result = run_rl(config, tmp_path / "run")
    assert result == read_json(tmp_path / "run" / "result.json")
    assert result["validation"] == result["validation_start"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model_folder, tmp_path / "run" / "model")]
    assert weights[0] == weights[1]
    assert set(result["accuracy"]) == {"start", "model", "difference"}
    assert result["accuracy"]["difference"]["sampled"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task": "addition-zh"}, "task = addition, not addition-zh"),
        ({"test_problems": 6}, "test_problems = 4, not 6"),
        ({"rl": LATE.model_copy(update={"learning_rate": 1e-5})}, "rl.learning_rate = 0.0008, not 1e-05"),
    ],
)
def test_another_run_is_refused_and_the_folder_still_says_what_it_holds(
    model_folder: Path, tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    """Also before the first state is saved: the best checkpoint and the start's value are there already."""
    config = RlConfig(model=model_folder, rl=LATE, validation_problems=4, test_problems=4, test_samples=2, device="cpu")

    def kill(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rl(config, tmp_path / "run", kill)
    kept = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(LiaoyuanError, match=f"holds a run with {said}.*choose another folder"):
        run_rl(config.model_copy(update=changed), tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_text() == kept


def test_the_command_line_takes_a_task_file_and_shows_the_gain(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sums.toml"
    file.write_text('[[parts]]\ntask = "addition"\nlevels = [1]\n\n[[parts]]\ntask = "modular"\nlevels = [2]\n')
    sizes = ["rl.steps=2", "rl.problems=4", "rl.group=2", "rl.max_tokens=6", "device=cpu"]
    sizes += ["validation_problems=4", "test_problems=4", "test_samples=2"]
    settings = [part for size in sizes for part in ("--set", size)]
    given = ["rl", "--model", str(model_folder), "--task", str(file), "--out", str(tmp_path / "out"), *settings]
    result = RUNNER.invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0
    assert "On 4 test problems, percent with 95% intervals" in result.output
    assert "the model it began with" in result.output and "+0.0 (+0.0 to +0.0)" in result.output
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 2
    assert "levels = [\n    1,\n    2,\n]" in (tmp_path / "out" / "config.toml").read_text()  # all that it has


def test_problems_that_the_model_was_trained_on_measure_nothing(model_folder: Path, tmp_path: Path) -> None:
    asked = held_out_problems(find_task("addition"), (1,), 4)
    Seen(model_folder).add(asked[:3])
    config = RlConfig(model=model_folder, rl=FEW, validation_problems=4, test_problems=4, test_samples=2, device="cpu")
    result = run_rl(config, tmp_path / "run")
    assert (result["test_problems"], result["test_problems_seen"]) == (1, 3)
    assert len(read_json(tmp_path / "run" / "measured" / "model.json")["greedy"]) == 1
