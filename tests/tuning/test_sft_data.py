"""`tune sft` takes the files that people have; what it leaves out is agreed to, and counted."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.tune import app
from liaoyuan.errors import LiaoyuanError

RUNNER = CliRunner()
ROWS = [
    {"instruction": "1+1=?", "output": "2"},
    {"conversations": [{"from": "human", "value": "2+2=?"}, {"from": "gpt", "value": "4"}]},
    {"prompt": "3+3=?", "chosen": "6", "rejected": "7"},
    {"prompt": "4+4=?", "completion": "8" * 99},
]


def sft(model: Path, data: Path, out: Path, *more: str) -> dict[str, object]:
    settings = ["train.steps=1", "train.batch_tokens=64", "sequence_length=32", "device=cpu"]
    given = [part for setting in settings for part in ("--set", setting)]
    arguments = ["sft", "--model", str(model), "--data", str(data), "--out", str(out), "--json", *given, *more]
    found: dict[str, object] = json.loads(RUNNER.invoke(app, arguments, catch_exceptions=False).stdout.splitlines()[-1])
    return found


def test_examples_in_any_layout_are_learned_and_what_is_left_out_is_counted(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("\n".join([*map(json.dumps, ROWS), "{"]))
    with pytest.raises(LiaoyuanError, match=r"1 of 5 lines are bad: line 5: expected JSON"):
        sft(model_folder, data, out)
    data.write_text("\n".join(map(json.dumps, ROWS)))
    with pytest.raises(LiaoyuanError, match=r"1 of 4 lines are bad: line 3: expected a record of kind chat or text"):
        sft(model_folder, data, out)
    data.write_text("\n".join(map(json.dumps, [*ROWS[:2], ROWS[3]])))
    with pytest.raises(LiaoyuanError, match=r"1 of 3 records do not fit in a sequence_length of 32; .*line 3"):
        sft(model_folder, data, out)
    assert not (out / "model").exists()
    data.write_text("\n".join([*map(json.dumps, ROWS), "{"]))
    found = sft(model_folder, data, out, "--skip-bad")
    assert (found["records"], found["left_out"]) == (2, 3)
    told = json.loads((out / "data_report.json").read_text())
    assert (told["used"], told["too_long"], told["bad_rows"]) == (2, 1, 2)
    assert told["file"]["bad"]["JSON"]["line"] == 5
