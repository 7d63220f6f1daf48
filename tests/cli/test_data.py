"""`liaoyuan data` makes a corpus from a run file and says in one sentence what is wrong."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.data import app
from liaoyuan.data import load_corpus, train_tokenizer
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


ROWS = [{"instruction": "q", "output": "a"}, {"prompt": "q", "chosen": "g", "rejected": "b"}, {"instruction": "q"}]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, [*ROWS, ROWS[0]])))
    return path


def test_examples_are_converted_only_whole_or_as_the_user_agrees(examples: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    with pytest.raises(LiaoyuanError, match=r"1 of 4 lines are bad: line 3: .*--skip-bad"):
        invoke("convert", str(examples), str(out))
    assert not out.exists()
    shown = invoke("convert", str(examples), str(out), "--skip-bad", "--licence", "MIT")
    assert "4 rows -> 3 records (chat 2, preference 1)" in shown
    assert "dropped: line 3: expected the fields of a known layout" in shown
    assert [json.loads(line)["licence"] for line in out.read_text().splitlines()] == ["MIT"] * 3


def test_check_says_what_is_in_a_file_and_ends_badly_if_a_line_is_bad(examples: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(examples)])
    assert result.exit_code == 1
    assert "layout: Alpaca 2, preference 1" in result.stdout
    assert "duplicates: 1 (the first: line 4 says what line 1 says)" in result.stdout
    examples.write_text(json.dumps(ROWS[0]))
    found = json.loads(invoke("check", str(examples), "--json"))
    assert (found["records"], found["kinds"], found["bad"], found["duplicates"]) == (1, {"chat": 1}, {}, 0)


def test_check_reads_with_a_models_tokenizer_what_is_learned(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train_tokenizer(["q a g b"], 263).save(tmp_path / "model")
    examples.write_text("\n".join(map(json.dumps, ROWS[:2])))
    shown = invoke("check", str(examples), "--model", str(tmp_path / "model"))
    assert "tokens: 24, of which 6 (25.0%) are learned" in shown
    assert "<|user|>q<|end|><|assistant|><think></think>\u27e6a<|end|>\u27e7" in shown
