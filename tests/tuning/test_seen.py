"""What a run learned from goes with its model, and `eval` refuses to call it a test."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model
from liaoyuan.checkpoint.convert import FURTHER_FILES
from liaoyuan.cli.eval import evaluate
from liaoyuan.cli.tune import app
from liaoyuan.data import Message, Record, Tokenizer, write_records
from liaoyuan.data.converting import convert_file
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import find_task, held_out_problems, to_record
from liaoyuan.tasks.seen import NAME, marks_of, read_seen, refuse_seen
from liaoyuan.tuning.reinforce import ReinforceConfig, reinforce
from liaoyuan.tuning.sources import problems_of

ADDITION = find_task("addition")
RL = ReinforceConfig(levels=(1, 2), steps=3, problems=3, group=2, max_tokens=6)


def learned(folder: Path) -> set[int]:
    return set(read_seen(folder).tolist())


def sft(model: Path, data: Path, out: Path) -> Path:
    settings = ("train.steps=2", "train.batch_tokens=128", "sequence_length=128", "device=cpu")
    given = [part for setting in settings for part in ("--set", setting)]
    told = ["sft", "--model", str(model), "--data", str(data), "--out", str(out), *given]
    assert CliRunner().invoke(app, told, catch_exceptions=False).exit_code == 0
    return out / "model"


def test_eval_refuses_what_was_trained_on_and_says_so_where_it_is_asked_to_go_on(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [to_record(problem) for problem in held_out_problems(find_task("addition-zh"), (1,), 3)]
    write_records(tmp_path / "data.jsonl", wrong)
    model = sft(model_folder, tmp_path / "data.jsonl", tmp_path / "sft")
    asked = {"task": "addition", "levels": "1", "problems": 6, "samples": 1, "fast": False, "seed": 0}
    with pytest.raises(LiaoyuanError, match="was trained on 3 of these 6 problems"):
        evaluate(model=model, json=True, **asked)  # type: ignore[arg-type]
    evaluate(model=model, json=False, seen=True, **asked)  # type: ignore[arg-type]
    assert "NOT A TEST: the model was trained on 3 of these 6 problems" in capsys.readouterr().out
    evaluate(model=model, json=True, seen=True, **asked)  # type: ignore[arg-type]
    assert '"seen": 3' in capsys.readouterr().out


def test_eval_refuses_a_public_sets_problems_that_were_learned_from_its_converted_file(
    model_folder: Path, tmp_path: Path
) -> None:
    """Its task asks the same questions, though with an instruction of its own behind them."""
    rows = [{"question": f"Ann has {n} figs. How many?", "answer": f"All <<{n}={n}>>{n}.\n#### {n}"} for n in range(40)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_file(tmp_path / "set.jsonl", tmp_path / "records.jsonl")
    model = sft(model_folder, tmp_path / "records.jsonl", tmp_path / "sft")
    (tmp_path / "set.toml").write_text("[[parts]]\ndata = 'set.jsonl'\nkind = 'gsm8k'\ninstruction = 'Use ####.'\n")
    with pytest.raises(LiaoyuanError, match=r"was trained on (\d+) of these \1 problems"):
        evaluate(model=model, json=True, task=str(tmp_path / "set.toml"), levels="0", problems=40, samples=1)


def pairs(level: int) -> list[Record]:
    """Return answers to 12 test problems, of which the right one is chosen."""
    return [
        Record(
            id=str(number),
            kind="preference",
            messages=(Message(role="user", content=problem.question),),
            chosen=(Message(role="assistant", content=problem.answer),),
            rejected=(Message(role="assistant", content="none"),),
        )
        for number, problem in enumerate(held_out_problems(ADDITION, (level,), 12))
    ]


@pytest.mark.parametrize("verb", ["dpo", "reward"])
def test_eval_refuses_what_was_learned_from_judged_answers(verb: str, model_folder: Path, tmp_path: Path) -> None:
    """And what the model it began from had learned; not what was held out. The control has learned the same."""
    write_records(tmp_path / "data.jsonl", [to_record(ADDITION.problem(9, 0, 1))])
    start = sft(model_folder, tmp_path / "data.jsonl", tmp_path / "sft")
    for name, level in (("learn", 1), ("held_out", 2)):
        write_records(tmp_path / f"{name}.jsonl", pairs(level))
    settings = ("train.steps=2", "train.batch_tokens=256", "sequence_length=128", "device=cpu", "control=true")
    told = [verb, "--model", start, "--data", tmp_path / "learn.jsonl", "--held-out", tmp_path / "held_out.jsonl"]
    told += ["--out", tmp_path / verb, *(part for setting in settings for part in ("--set", setting))]
    assert CliRunner().invoke(app, [str(part) for part in told], catch_exceptions=False).exit_code == 0
    learning, held_out = (held_out_problems(ADDITION, (level,), 12) for level in (1, 2))
    for model in (tmp_path / verb / "model", tmp_path / verb / "control" / "model"):
        with pytest.raises(LiaoyuanError, match="was trained on 12 of these 12 problems"):
            refuse_seen(model, learning)
        assert refuse_seen(model, held_out) == 0
        assert learned(start) < learned(model) == learned(tmp_path / verb)


def test_rl_keeps_what_every_step_and_the_start_model_learned(model_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "data.jsonl", [to_record(ADDITION.problem(9, 0, 1))])
    start = sft(model_folder, tmp_path / "data.jsonl", tmp_path / "sft")
    sizes = ["levels=[1,2]", "steps=2", "problems=2", "group=2", "max_tokens=6"]
    given = [part for size in sizes for part in ("--set", f"rl.{size}")]
    told = ["rl", "--model", str(start), "--out", str(tmp_path / "rl"), "--set", "validation_problems=2", *given]
    assert CliRunner().invoke(app, [*told, "--set", "device=cpu"], catch_exceptions=False).exit_code == 0
    assert learned(start) < learned(tmp_path / "rl" / "model") == learned(tmp_path / "rl")


def test_a_resumed_run_has_learned_from_the_same_problems(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_folder)
    for name, parts in (("whole", (3,)), ("stopped", (1, 3))):
        for until in parts:
            done = reinforce(load_model(model_folder), tokenizer, ADDITION, RL, tmp_path / name, until=until)
    wanted = {
        one
        for step, levels in enumerate(done.drawn)
        for problem in problems_of(ADDITION, RL, step, levels)
        for one in marks_of(problem)
    }
    assert learned(tmp_path / "stopped") == learned(tmp_path / "whole") == wanted


def test_the_list_goes_wherever_the_weights_go() -> None:
    assert NAME in FURTHER_FILES
