"""`liaoyuan data` makes a corpus from a run file and says in one sentence what is wrong."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.data import app
from liaoyuan.data import load_corpus
from liaoyuan.errors import LiaoyuanError


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"document {number}: {number * number}\n" * 20)
    path = tmp_path / "run.toml"
    path.write_text(f"text = {json.dumps(str(folder))}\nvocab_size = 300\n")
    return path


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_a_run_file_makes_a_corpus_and_the_resolved_config_makes_the_same(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    shown = invoke(str(run_file), "--set", "held_out_share=0.2", "--out", str(out))
    assert "training: " in shown
    assert "held out: " in shown
    manifest = json.loads(invoke(str(out / "config.toml"), "--out", str(tmp_path / "again"), "--json"))
    assert manifest == load_corpus(out).manifest
    assert manifest["config"]["held_out_share"] == 0.2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--set", "vocabulary_size=300"], "did you mean 'vocab_size'"),
        (["--set", "vocab_size=many"], "vocab_size"),
        (["--set", "vocab_size=10"], "vocab_size must be at least"),
        (["--text", "nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(run_file: Path, tmp_path: Path, arguments: list[str], reason: str) -> None:
    with pytest.raises(LiaoyuanError, match=reason):
        invoke(str(run_file), *arguments, "--out", str(tmp_path / "corpus"))
    assert not (tmp_path / "corpus" / "manifest.json").exists()
