"""A user's own tuning: records are learned, RL keeps its best checkpoint, mistakes are one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model
from liaoyuan.cli.eval import evaluate
from liaoyuan.cli.tune import app
from liaoyuan.data import Tokenizer, write_records
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Proof
from liaoyuan.ops import configure, seek_exactness
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks import TASKS, to_record
from liaoyuan.tuning.reinforce import ReinforceConfig
from liaoyuan.tuning.rl_run import RlConfig, run_rl

RUNNER = CliRunner()
SETTINGS = ["train.steps=12", "train.batch_tokens=128", "sequence_length=32", "device=cpu"]
TRAIN = [part for setting in SETTINGS for part in ("--set", setting)]


def records(path: Path) -> Path:
    write_records(path, [to_record(TASKS["addition"].problem(0, index, 1)) for index in range(8)])
    return path


def test_sft_learns_a_file_of_records(model_folder: Path, tmp_path: Path) -> None:
    data, out = records(tmp_path / "data.jsonl"), tmp_path / "out"
    given = ["sft", "--model", str(model_folder), "--data", str(data), "--out", str(out), "--json", *TRAIN]
    result = RUNNER.invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0
    losses = [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert load_model(out / "model").config.vocab_size == Tokenizer.load(out / "model").vocab_size


def test_two_processes_with_fsdp_give_the_loss_of_one(model_folder: Path, tmp_path: Path) -> None:
    data = records(tmp_path / "data.jsonl")
    given = ["sft", "--model", str(model_folder), "--data", str(data), *TRAIN]
    RUNNER.invoke(app, [*given, "--out", str(tmp_path / "1")], catch_exceptions=False)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "liaoyuan", "tune", *given, "--out", str(tmp_path / "2")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {processes: read_metrics(tmp_path / str(processes) / "metrics.jsonl") for processes in (1, 2)}
    losses = {processes: [row["loss"] for row in rows[processes]] for processes in rows}
    assert losses[1] == pytest.approx(losses[2], abs=2e-5)
    assert len(losses[1]) == 12


def test_rl_keeps_the_best_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    sizes = ["levels=[1]", "steps=2", "problems=2", "group=2", "max_tokens=8"]
    settings = [part for size in sizes for part in ("--set", f"rl.{size}")]
    out = tmp_path / "out"
    given = ["rl", "--model", str(model_folder), "--task", "addition", "--out", str(out), *settings]
    few = [part for name in ("validation_problems=4", "test_problems=6", "device=cpu") for part in ("--set", name)]
    result = RUNNER.invoke(app, [*given, *few], catch_exceptions=False)
    assert result.exit_code == 0
    assert (out / "model" / "model.safetensors").read_bytes() == (out / "best" / "model.safetensors").read_bytes()
    assert {"reward", "no_signal", "length", "entropy", "cpu_seconds", "flops"} <= read_metrics(out / "metrics.jsonl")[
        0
    ].keys()


def test_mistakes_are_sentences(model_folder: Path, tmp_path: Path) -> None:
    cases = [
        (["rl", "--model", str(model_folder), "--task", "additon"], "addition"),
        (["rl", "--model", str(model_folder), "--set", "rl.levels=[12]"], "addition has the levels 1 to 8"),
        (["rl", "--model", str(model_folder), "--set", "rl.levels=[]"], "rl.levels"),
        (["rl", "--model", str(model_folder), "--set", "rl.update_group=1"], "rl.update_group"),
        (["sft", "--model", str(model_folder), "--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["sft", "--model", str(tmp_path), "--data", str(records(tmp_path / "d.jsonl"))], "tokenizer"),
        (["rl", "--model", str(model_folder), "--set", "rl.step=3"], "steps"),
    ]
    for given, named in cases:
        with pytest.raises(LiaoyuanError, match=named):
            RUNNER.invoke(app, [*given, "--out", str(tmp_path / "out")], catch_exceptions=False)


def test_eval_prints_intervals(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(model=model_folder, task="addition", levels="1", problems=6, samples=2, fast=False, seed=0, json=True)
    assert '"pass_at_2"' in capsys.readouterr().out
    with pytest.raises(LiaoyuanError, match="2-4"):
        evaluate(model=model_folder, task="addition", levels="x", problems=6, samples=2, fast=False, seed=0, json=True)
    with pytest.raises(LiaoyuanError, match="levels 1 to 8, not 9"):
        evaluate(
            model=model_folder, task="addition", levels="8-9", problems=6, samples=2, fast=False, seed=0, json=True
        )
    with pytest.raises(LiaoyuanError, match="levels 1 to 8, not none"):
        evaluate(
            model=model_folder, task="addition", levels="4-2", problems=6, samples=2, fast=False, seed=0, json=True
        )


def test_rl_that_must_be_exact_is_so_without_compiled_kernels_or_does_not_begin(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = ReinforceConfig(levels=(1,), steps=1, problems=2, group=2, max_tokens=6)
    config = RlConfig(
        model=model_folder,
        rl=few,
        validation_problems=2,
        test_problems=2,
        device="cpu",
        ops=dict.fromkeys(OPERATORS, "reference"),
    )
    try:
        assert run_rl(config, tmp_path / "stock")["exact"] is False
        assert run_rl(config.model_copy(update={"exact": True}), tmp_path / "exact")["exact"] is True
        monkeypatch.setattr(Proof, "exact", False)
        with pytest.raises(LiaoyuanError, match="Exact mode was asked for and cannot be had"):
            run_rl(config.model_copy(update={"exact": True}), tmp_path / "refused")
        assert not (tmp_path / "refused" / "model").exists()
    finally:
        seek_exactness(False)
        configure({})
