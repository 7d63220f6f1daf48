"""`tune sft` takes the files that people have; what it leaves out is agreed to, and counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from liaoyuan.cli.tune import app
from liaoyuan.data import Message, Record, RecordTokens, Tokenizer, read_records, tokenise
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tuning.held_out import content_hash
from liaoyuan.tuning.sft_data import read_source

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
    with pytest.raises(
        LiaoyuanError, match=r"1 of 4 lines are bad: line 3: expected a record of kind chat or text, .*tune dpo"
    ):
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


def test_a_part_of_a_file_is_found_among_its_tokens_though_rows_are_bad_and_share_a_line(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data.json"
    rows = [*ROWS, {"text": "7+7=14, " * 20}, {"wrong": 1}, {"instruction": "5+5=?", "output": "10"}]
    data.write_text(json.dumps(rows))
    source = read_source(data, tokenizer, 32, True, lambda _: None)
    assert [record.messages[-1].content for record in source.records] == ["2", "4", "7+7=14, " * 20, "10"]
    assert source.tokens.left_out == 3
    talks = source.records.at(np.array([0, 1, 3]))
    assert source.tokens_of(talks) == RecordTokens.of(tokenise(tokenizer, list(talks)))
    pieces = source.tokens_of(source.records[2:3])
    assert len(pieces) > 1 and max(pieces.sizes) == 33
    assert [token for piece in pieces for token in piece.tokens[1:].tolist()] == list(
        tokenise(tokenizer, [source.records[2]])[0].tokens[1:]
    )


def test_what_is_held_out_of_a_file_in_any_layout_is_not_learned(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps({"instruction": f"{n}+1=?", "output": f"{n + 1}"}) for n in range(40)))
    found = sft(model_folder, data, out, "--set", "validation_share=0.25")
    held = read_records(out / "held_out.jsonl.zst")
    assert len(held) == 10 and found["records"] == 30 and "comparison" in found
    told = json.loads((out / "data_report.json").read_text())
    assert told["used"] == 40 and told["file"]["layouts"] == {"Alpaca": 40}


def test_answers_without_a_question_are_told_apart_by_both_sides() -> None:
    def pair(chosen: str, rejected: str) -> Record:
        sides = {"chosen": (Message(role="assistant", content=chosen),)}
        return Record(id="1", kind="preference", rejected=(Message(role="assistant", content=rejected),), **sides)

    assert len({content_hash(pair(*one)) for one in (("a", "b"), ("c", "b"), ("a", "c"))}) == 3
