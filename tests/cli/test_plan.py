"""`liaoyuan plan` answers before anything exists, and says what is wrong with a job that cannot be."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from liaoyuan.cli.main import app
from liaoyuan.cli.plan_job import parse_layout
from liaoyuan.compute.plan import read_cluster
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.errors import LiaoyuanError

RUN = """
corpus = "nowhere"
sequence_length = 64
[model]
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 4
[train]
steps = 10
batch_tokens = 131072
microbatches = 4
[layout]
tp = 2
pp = 2
"""


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where a page is written, if one is
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-8")
    return tmp_path / "run.toml"


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_thousand_processes_are_planned_by_one(run_file: Path) -> None:
    found = json.loads(plan(run_file, "--processes", 1024, "--vocab", 512, "--json").stdout)
    first, last = found["footprints"]
    assert (first["rank"], last["rank"]) == (0, 512)
    assert 0 < first["lasting"] < first["peak"] and first["flops"] > 0
    assert sum(part["bytes"] for part in first["held"]) == first["peak"]
    stream = 4 * 128 * 64 * 2 // 2  # bytes: 4 microbatches of 2 rows, bf16, cut over the two processes of tp
    assert stream <= first["sent"]["pp: send"]["bytes"] < stream + 200  # and a word on shapes


def test_what_is_told_names_layers_once(run_file: Path) -> None:
    text = plan(run_file, "--processes", 8, "--vocab", 512, "--rank", 0, "--set", "train.batch_tokens=4096").stdout
    assert "pp 2 x fsdp 2 x tp 2" in text and "Process 0: peak" in text and "layers.*.mlp" in text
    assert "sent, tp: all-gather" in text and "layers.0" not in text


def test_the_dry_run_is_meant_where_no_command_is_named(run_file: Path) -> None:
    wrong = (run_file, "--vocab", 512, "--layout", "tp")
    assert str(plan(*wrong).exception) == str(plan("dry-run", *wrong).exception) != "None"
    assert "goodput" in plan("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layout", "tp"], "must look like tp=8"),
        (["--layout", "tq=2"], "did you mean 'tp'"),
        (["--layout", "tp=3"], "nearest layout that fits"),
        (["--rank", "8"], "numbered 0 to 7"),
    ],
)
def test_what_cannot_be_is_told(run_file: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(LiaoyuanError, match=said):
        app(["plan", str(run_file), "--processes", "8", "--vocab", "512", *arguments], standalone_mode=False)


def test_without_a_corpus_the_vocabulary_must_be_given(run_file: Path) -> None:
    with pytest.raises(LiaoyuanError, match="--vocab"):
        app(["plan", str(run_file)], standalone_mode=False)


def test_axes_of_context_parallel_are_named_plainly() -> None:
    assert parse_layout("tp=2, ring=4") == {"tp": "2", "cp": {"ring": "4"}}


def test_a_step_is_told_with_its_reasons(run_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    assumed(read_cluster("h100")).median().save(profile)
    arguments = (run_file, "--processes", 2, "--vocab", 512, "--layout", "fsdp=2", "--cluster", "h100", "--explain")
    text = plan(*arguments, "--set", "train.batch_tokens=4096").stdout
    assert "A step takes" in text and "tokens/s on each card" in text and "waiting for" in text
    assert "It is as wide because of" in text and "links." not in text.split("rests on")[1]
    assert "it fits in 79.60 GiB" in text and "runtime and buffers of collectives" in text
    found = json.loads(plan(*arguments, "--set", "train.batch_tokens=4096", "--profile", profile, "--json").stdout)
    seconds = found["step"]["seconds"]
    assert seconds["low"] == seconds["median"] == seconds["high"] > 0  # every figure is certain
    waited = sum(found["step"]["exposed"].values())
    assert found["step"]["computing"] + waited == pytest.approx(seconds["median"])
    (memory,) = found["memory"]
    assert memory["timeline"][0][1] == memory["timeline"][-1][1] == memory["lasting"]
    assert max(held for _, held in memory["timeline"]) == memory["tensors"] < memory["total"]["median"]


def test_a_step_is_not_told_without_a_cluster(run_file: Path) -> None:
    result = plan(run_file, "--processes", 2, "--vocab", 512, "--explain")
    assert isinstance(result.exception, LiaoyuanError) and "needs --cluster" in str(result.exception)
