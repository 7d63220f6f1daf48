"""Rejection sampling: what is kept and why, records that are learned as they were drawn, and a run that goes on."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model
from liaoyuan.cli.tune import app
from liaoyuan.data import Tokenizer, read_records, tokenise
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import prompt_of, read_rollout
from liaoyuan.inference import Completion
from liaoyuan.rundir import Progress, read_metrics, write_json
from liaoyuan.tasks import Problem, Rollout, Score, find_task, to_record
from liaoyuan.tasks.seen import marks_of, marks_of_record
from liaoyuan.tuning.card import name_of
from liaoyuan.tuning.rejection import Answer, Rule, harvest, sift
from liaoyuan.tuning.rollout import Rollouts
from liaoyuan.tuning.rollout_log import read_rollouts, rows_of
from liaoyuan.tuning.sample_run import SampleConfig, run_sample

RUNNER = CliRunner()


def test_why_each_answer_is_kept_or_not() -> None:
    answers = [
        Answer("a", 1.0),
        Answer("b", 0.0),
        Answer("a", 1.0),
        Answer("c", None),
        Answer("d", 1.0, "cut off"),
        Answer("e", 2.0),
        Answer("f", 1.0),
    ]
    fates = ["kept", "too low", "the same", "not judged", "not whole", "kept", "kept"]
    assert sift(answers, Rule()) == fates
    best = sift(answers, Rule(most=2))
    assert [place for place, fate in enumerate(best) if fate == "kept"] == [0, 5] and best[6] == "beyond the best"
    assert sift(answers, Rule(least=None))[1] == "kept"


def test_records_name_the_run_whose_model_wrote_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert [name_of(Path(place)) for place in ("runs/sft/model", "start", "model")] == ["sft", "start", tmp_path.name]


def solved(tokenizer: Tokenizer, problem: Problem) -> tuple[tuple[int, ...], list[int]]:
    """Return the prompt of a problem and what a model writes that knows its worked solution."""
    prompt = prompt_of(tokenizer, problem)
    (whole,) = tokenise(tokenizer, [to_record(problem)])
    return prompt, list(whole.tokens[len(prompt) :])


def test_what_is_learned_from_a_record_is_what_was_drawn(tokenizer: Tokenizer) -> None:
    problems = [find_task("addition").problem(0, place, 3) for place in range(3)]
    drawn = [solved(tokenizer, problem) for problem in problems]
    completions = [Completion(0, tokens, [0.0] * len(tokens), "stop") for _, tokens in drawn]
    answers = [read_rollout(tokenizer, *pair) for pair in zip(problems, completions, strict=True)]
    scores, rewards = [Score(1.0)] * 3, torch.ones(3, 1)
    rollouts = Rollouts(problems, [prompt for prompt, _ in drawn], completions, answers, scores, rewards)
    records = harvest(rows_of(0, rollouts, None), Rule(), "it").records
    for record, (prompt, tokens), problem in zip(records, drawn, problems, strict=True):
        (learned,) = tokenise(tokenizer, [record])
        assert learned.tokens == (*prompt, *tokens)
        assert [weight > 0 for weight in learned.weights] == [False] * len(prompt) + [True] * len(tokens)
        assert record.messages[1].think == problem.thought and record.answer == problem.answer
        assert (record.task, record.level, record.model, record.score) == ("addition", 3, "it", 1.0)
        assert set(marks_of(problem)) <= set(marks_of_record(record))  # so no model is measured on what it learned


@pytest.fixture
def even_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read answers whose first token is even as right ones, whose thoughts differ."""

    def read(_: Tokenizer, problem: Problem, answer: Completion) -> Rollout:
        return Rollout(problem, str(answer.tokens), "-" if answer.tokens[0] % 2 else problem.answer)

    monkeypatch.setattr("liaoyuan.tuning.rollout.read_rollout", read)


CONFIG = {"levels": (1, 2), "problems": 10, "samples": 4, "batch": 3, "max_tokens": 4, "most": 0}


@pytest.mark.usefixtures("even_is_right")
def test_a_killed_run_ends_byte_for_byte_as_one_never_interrupted(model_folder: Path, tmp_path: Path) -> None:
    config = SampleConfig.model_validate({"model": model_folder, **CONFIG})

    def kill(progress: Progress) -> None:
        if progress.done == 6:
            raise KeyboardInterrupt

    whole = run_sample(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_sample(config, tmp_path / "killed", kill)
    begun = list[int]()
    again = run_sample(config, tmp_path / "killed", lambda progress: begun.append(progress.done))
    assert begun == [9, 10]  # what was drawn is not drawn again
    for name in ("records.jsonl", *(f"rollouts/{step:06d}.jsonl.zst" for step in range(4))):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again["levels"] == whole["levels"] and again["generated_tokens"] == whole["generated_tokens"]
    assert len(read_metrics(tmp_path / "killed/metrics.jsonl")) == 4
    counts = whole["levels"]["1"]
    assert (counts["kept"] + counts["too low"] + counts["the same"], counts["problems"]) == (20, 5)
    assert 0 < whole["records"] < 40


@pytest.mark.usefixtures("even_is_right")
def test_another_rule_sifts_the_same_answers_and_another_temperature_is_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    config = SampleConfig.model_validate({"model": model_folder, **CONFIG})
    first = run_sample(config, tmp_path)
    assert {record.model for record in read_records(tmp_path / "records.jsonl")} == {"start"}
    told = list[Progress]()
    second = run_sample(config.model_copy(update={"most": 1}), tmp_path, told.append)
    assert second["records"] == sum(row["solved"] for row in first["levels"].values()) < first["records"]
    assert not told
    with pytest.raises(LiaoyuanError, match=r"temperature = 1\.0, not 0\.5"):
        run_sample(config.model_copy(update={"temperature": 0.5}), tmp_path)


@pytest.mark.usefixtures("even_is_right")
def test_the_records_of_the_verb_are_learned_by_sft_as_they_are(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = [part for name in ("batch=8", "max_tokens=4", "device=cpu") for part in ("--set", name)]
    given = ["--model", str(model_folder), "--task", "addition", "--levels", "1-2", "--problems", "8", "--samples", "3"]
    done = RUNNER.invoke(app, ["sample", *given, *settings, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and "too low" in done.stdout and "records are in" in done.stdout
    records = read_records(out / "records.jsonl")
    sizes = ["train.steps=3", "train.batch_tokens=128", "sequence_length=64", "device=cpu", "validation_share=0"]
    sft = [part for name in sizes for part in ("--set", name)]
    given = ["sft", "--model", str(model_folder), "--data", str(out / "records.jsonl"), "--out", str(tmp_path / "sft")]
    assert RUNNER.invoke(app, [*given, *sft], catch_exceptions=False).exit_code == 0
    card = (tmp_path / "sft/model/README.md").read_text()
    assert "answers of start" in card and str(len(records)) in card


@pytest.mark.usefixtures("even_is_right")
def test_a_reward_model_says_which_answers_are_best(model_folder: Path, tmp_path: Path) -> None:
    config = SampleConfig.model_validate({"model": model_folder, "reward_model": model_folder, **CONFIG, "most": 1})
    with pytest.raises(LiaoyuanError, match=r"no reward model"):
        run_sample(config, tmp_path)
    write_json(
        model_folder / "liaoyuan_reward.json", {"mark": load_model(model_folder).config.eos_token_id, "thoughts": True}
    )
    assert run_sample(config, tmp_path)["records"] == 10  # of each problem the best, whatever it is worth
    rows = [row for path in sorted((tmp_path / "rollouts").iterdir()) for row in read_rollouts(path)]
    for record in read_records(tmp_path / "records.jsonl"):
        own = [row["reward"] for row in rows if row["question"] == record.messages[0].content]
        assert record.score == max(own) and len(set(own)) > 1


def test_mistakes_are_sentences(model_folder: Path, tmp_path: Path) -> None:
    model = ["sample", "--model", str(model_folder), "--out", str(tmp_path)]
    cases = [
        ([*model, "--task", "additon"], "did you mean 'addition'"),
        ([*model, "--levels", "9-12"], "addition has the levels 1 to 8"),
        (["sample", "--out", str(tmp_path)], "The key 'model' is missing"),
        ([*model, "--set", "mots=3"], "did you mean 'most'"),
    ]
    for given, words in cases:
        assert words in str(RUNNER.invoke(app, given).exception), given
