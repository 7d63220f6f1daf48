"""`tune study` on the command line: a file's settings count unless the command line gives others."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.tune import app
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tuning.study_run import StudyRunConfig

FILE = """seeds = 2
[study.lesson]
task = "modular"
levels = [3]
[study.rl]
levels = [4]
"""


class Asked(Exception):  # noqa: N818  (carries what was asked for)
    """The config with which a study would begin."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def run(config: StudyRunConfig, *_: Any) -> None:
        raise Asked(config)

    monkeypatch.setattr("liaoyuan.tuning.study_run.run_study", run)
    (tmp_path / "study.toml").write_text(FILE)
    return tmp_path


def asked(folder: Path, *words: str) -> StudyRunConfig:
    with pytest.raises(Asked) as found:
        CliRunner().invoke(app, ["study", "--model", "m", "--out", str(folder), *words], catch_exceptions=False)
    config: StudyRunConfig = found.value.args[0]
    return config


def test_what_the_file_says_counts_unless_the_command_line_says_otherwise(folder: Path) -> None:
    file = ("--config", str(folder / "study.toml"))
    plain, changed = asked(folder, *file), asked(folder, *file, "--levels", "2-3", "--seeds", "1")
    assert (plain.seeds, plain.study.lesson.task) == (2, "modular")
    assert (plain.study.lesson.levels, plain.study.rl.levels) == ((3,), (4,))
    assert (changed.seeds, changed.study.lesson.task) == (1, "modular")
    assert changed.study.lesson.levels == changed.study.rl.levels == (2, 3)
    assert asked(folder).study == StudyRunConfig(model=Path("m")).study


def test_what_is_given_twice_is_refused_if_it_differs(folder: Path) -> None:
    for words in (
        ("study", "--model", "m", "--seeds", "2", "--set", "seeds=3"),
        ("sft", "--model", "m", "--data", "d", "--set", "model=n"),
        ("dpo", "--model", "m", "--data", "d", "--skip-bad", "--set", "skip_bad=false"),
        ("rl", "--model", "m", "--lora", "--set", "method=full"),
        ("sample", "--model", "m", "--samples", "2", "--set", "samples=3"),
    ):
        with pytest.raises(LiaoyuanError, match="is given twice"):
            CliRunner().invoke(app, words, catch_exceptions=False)
    assert asked(folder, "--seeds", "2", "--set", "seeds=2").seeds == 2


def test_levels_that_the_task_lacks_are_refused_wherever_they_are_given(folder: Path) -> None:
    for words in (("--levels", "2-99"), ("--set", "study.rl.levels=[99]")):
        with pytest.raises(LiaoyuanError, match="99"):
            CliRunner().invoke(app, ["study", "--model", "m", *words], catch_exceptions=False)
