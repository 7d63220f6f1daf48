"""Preference tuning as a user runs it: it learns what was chosen, whatever is packed together, killed, or divided."""

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model
from liaoyuan.cli.tune import app
from liaoyuan.data import Message, Record, Tokenizer, write_records
from liaoyuan.data.records import read_lines
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import score
from liaoyuan.models import Decoder
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.tasks import TASKS
from liaoyuan.tasks.rewards.judged import log_odds_of, read_reading
from liaoyuan.tuning.preference import run_preference
from liaoyuan.tuning.preference_batches import AnswerBatches, Judged, judge, strangers
from liaoyuan.tuning.preference_config import PreferenceConfig, PreferenceTrain
from liaoyuan.tuning.preference_objective import PreferenceLoss, PreferenceObjective
from liaoyuan.tuning.reference import answer_log_probs
from tests.conftest import ROOT
from tests.parallel.processes import run_verb
from tests.verbs import Verb

RUNNER = CliRunner()
LENGTH = 96
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo", "reward")
TRAIN = PreferenceTrain(steps=8, batch_tokens=4 * LENGTH, learning_rate=3e-3, warmup_steps=0, checkpoint_every=2)


def turns(*texts: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(role=roles[place % 2], content=text) for place, text in enumerate(texts))  # type: ignore[arg-type]


def pairs(count: int = 40) -> list[Record]:
    """The right sum against the one after it, of problems with answers of different lengths."""
    found = []
    for index in range(count):
        problem = TASKS["addition"].problem(0, index, 1)
        wrong = str(int(problem.answer) + 1) + "0" * (index % 3)
        given = {"messages": turns(problem.question), "rejected": (Message(role="assistant", content=wrong),)}
        chosen = (Message(role="assistant", content=problem.answer),)
        found.append(
            Record(id=problem.key, kind="preference", chosen=chosen, source="pairs of sums", licence="CC0", **given)
        )
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_records(tmp_path / "pairs.jsonl", pairs())
    return tmp_path / "pairs.jsonl"


def config(model: Path, data: Path, loss: str = "dpo", **more: Any) -> PreferenceConfig:
    preference = PreferenceLoss.model_validate({"loss": loss, **more.pop("preference", {})})
    given = {"train": TRAIN, "sequence_length": LENGTH, "device": "cpu", "held_out_share": 0.3, **more}
    return PreferenceConfig(model=model, data=data, preference=preference, **given)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_was_chosen_becomes_more_likely_than_what_was_not(
    loss: str, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    # ORPO is mostly fine-tuning on what was chosen, unless its other term weighs more than usual.
    strong = {"beta": 5.0} if loss == "orpo" else {}
    done = run_preference(config(model_folder, data, loss, preference=strong), tmp_path / "out")
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"accuracy", "margin", "chosen_log_prob", "rejected_log_prob", "grad_norm"} <= rows[0].keys()
    assert ("kl" in rows[0]) is (loss in ("dpo", "ipo", "kto"))
    assert rows[-1]["margin"] > rows[0]["margin"]
    found = done["comparison"]
    assert found["model - start"]["margin"]["low"] > 0, "on problems that it did not learn from"
    assert found["start"]["margin"]["mean"] < found["model"]["margin"]["mean"]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"preference tuning ({loss})" in card and "| held out | pairs of sums | CC0 |" in card
    assert f"liaoyuan tune {'reward' if loss == 'reward' else 'dpo'} " in card and "| model - start, margin |" in card


def test_a_run_begins_where_its_reference_is(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """The reference has the bits of the training pass: a first margin of exactly nothing, a first loss of log 2."""
    for loss in ("dpo", "kto"):
        run_preference(config(model_folder, data, loss), tmp_path / loss)
        first = read_metrics(tmp_path / loss / "metrics.jsonl")[0]
        assert first["margin"] == first["kl"] == 0.0
        assert first["loss"] == pytest.approx(math.log(2) if loss == "dpo" else 0.5, abs=1e-6)


def test_the_log_probabilities_are_those_of_scoring_each_answer_alone(
    small_model: Decoder, tokenizer: Tokenizer
) -> None:
    items = judge(tokenizer, pairs(10), paired=True)
    answers = [answer for item in items for answer in item.answers]
    found = answer_log_probs(Program([small_model]), answers, LENGTH, World())
    alone = score(small_model, [answer.tokens for answer in answers])
    for one, answer, expected in zip(found.tolist(), answers, alone, strict=True):
        learned = sum(x * weight for x, weight in zip(expected, answer.weights[1:], strict=True))
        assert one == pytest.approx(learned, abs=1e-4)
        text = tokenizer.decode([token for token, weight in zip(answer.tokens, answer.weights, strict=True) if weight])
        assert text.strip() and "?" not in text, "the question is no part of what is judged"


def step_of(
    loss: str, model: Decoder, items: list[Judged], cut: list[list[list[int]]], length: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return what one step over all items shows, and its gradients; cut: the items of each microbatch's rows."""
    program = Program([model])
    answers = [answer for item in items for answer in item.answers]
    others = strangers(items, LENGTH)
    # A reference that is not the policy: the losses are then not symmetric.
    reference, apart = torch.linspace(-9, -3, len(answers)), torch.linspace(-30, -20, len(others))
    batches = AnswerBatches(items, reference, 0, length, length, others=(others, apart))
    own = [batches.batch(rows) for rows in cut]
    objective = PreferenceObjective(PreferenceLoss(loss=loss))  # type: ignore[arg-type]
    losses = objective.losses(program, own, World())
    found = program.backward(own, 1.0 / sum(map(objective.count, own)), losses=losses).tolist()
    gradients = {name: weight.grad.clone() for name, weight in program.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": found[0], **objective.values(found[1:])}, gradients


@pytest.mark.parametrize("loss", LOSSES)
def test_packing_never_changes_the_loss(loss: str, small_model: Decoder, tokenizer: Tokenizer) -> None:
    items = judge(tokenizer, pairs(9), True, tokenizer.eos_ids[0] if loss == "reward" else None)
    alone, expected = step_of(loss, small_model, items, [[[item]] for item in range(9)], LENGTH)
    assert alone.get("kto_divergence", 1.0) > 0.0
    cuts = [[[[*range(9)]]], [[[8, 1, 2], [3, 4]], [[0, 6, 7], [5]]], [[[2, 3, 4, 5, 6, 7], [8, 0, 1]]]]
    for cut in cuts:
        packed, gradients = step_of(loss, small_model, items, cut, 9 * LENGTH)
        assert packed == pytest.approx(alone, rel=1e-5, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)


def test_batches_hold_every_pair_whole_once_an_epoch(tokenizer: Tokenizer) -> None:
    items = judge(tokenizer, pairs(12), True)
    reference = torch.arange(24.0)
    whole = AnswerBatches(items, reference, 3, 4 * LENGTH, LENGTH)
    halves = [AnswerBatches(items, reference, 3, 4 * LENGTH, LENGTH, 2, rank, 2) for rank in (0, 1)]
    seen: list[float] = []
    for step in range(6):
        (batch,) = whole(step)
        assert batch.liked.view(-1, 2).tolist() == [[True, False]] * (len(batch.liked) // 2)
        assert (batch.reference[1::2] - batch.reference[0::2] == 1).all()
        parts = [part for half in halves for part in half(step)]
        assert torch.cat([part.tokens for part in parts]).equal(batch.tokens)
        assert torch.cat([part.reference for part in parts]).equal(batch.reference)
        for document, place in zip(batch.documents.tolist(), batch.reference.long().tolist(), strict=True):
            begin, end = batch.boundaries[document : document + 2].tolist()
            assert batch.tokens[begin:end].tolist() == list(items[place // 2].answers[place % 2].tokens[:-1])
        seen += batch.reference.tolist()
    assert sorted(seen[:24]) == reference.tolist()


KILLED = """
import os, sys
from pathlib import Path
import torch
from liaoyuan.tasks.rewards.judged import log_odds_of, read_reading
from liaoyuan.training import loop
from liaoyuan.tuning.preference import run_preference
from liaoyuan.tuning.preference_config import PreferenceConfig
torch.set_num_threads(1)
loop.REPORT_SECONDS = 0.0
def kill(progress):
    if progress.unit == "step" and progress.done == int(sys.argv[3]):
        os.kill(os.getpid(), int(sys.argv[4]))
run_preference(PreferenceConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), kill)
"""


def interrupted(given: PreferenceConfig, folder: Path, step: int, number: int) -> tuple[int, str]:
    """Begin or go on, and get a signal after a step; return exit code and standard error."""
    killed = Verb(given.model_dump_json(), folder, step, int(number), program=KILLED)
    _, said = killed.communicate(300)
    return killed.wait(), said


def test_a_run_stopped_by_ctrl_c_and_then_killed_ends_bit_for_bit_as_one_never_interrupted(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    given, out = config(model_folder, data, "kto"), tmp_path / "out"
    whole = run_preference(given, tmp_path / "whole")
    _, said = interrupted(given, out, 3, signal.SIGINT)
    assert "Stopped after step 4 of 8; the same command goes on from there" in said
    assert interrupted(given, out, 7, signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(list(out.glob("reference-*"))) == 1
    again = run_preference(given, out)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", out)]
    assert weights[0] == weights[1]
    assert again["comparison"] == whole["comparison"]
    for one, other in zip(
        *(read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "whole", out)), strict=True
    ):
        for key in ("step", "loss", "margin", "accuracy", "grad_norm"):
            assert one[key] == other[key]


def test_the_reference_is_computed_once_for_the_same_weights_and_answers(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def count(progress: Progress) -> None:
        passes.append(progress.unit == "pass")

    run_preference(config(model_folder, data), tmp_path / "out", count)
    assert any(passes)
    passes.clear()
    run_preference(config(model_folder, data), tmp_path / "out", count)
    assert not any(passes)
    write_records(data, pairs(39))
    run_preference(config(model_folder, data), tmp_path / "other", count)
    assert any(passes)


def test_a_run_goes_on_only_as_what_it_was(model_folder: Path, data: Path, tmp_path: Path) -> None:
    run_preference(config(model_folder, data), tmp_path / "out")
    with pytest.raises(LiaoyuanError, match=r"holds a run with preference.beta = .*, not 0.5"):
        run_preference(config(model_folder, data, preference={"beta": 0.5}), tmp_path / "out")
    later = config(model_folder, data, control=True)
    assert "control" in run_preference(later, tmp_path / "out")["comparison"]
    with pytest.raises(LiaoyuanError, match="holds a run with control_learning_rate"):
        run_preference(later.model_copy(update={"control_learning_rate": 1e-3}), tmp_path / "out")
    write_records(data, pairs(20))
    with pytest.raises(LiaoyuanError, match="holds a run on other data"):
        run_preference(later, tmp_path / "out")


def verb(*given: object) -> list[str]:
    settings = [f"train.{key}={value}" for key, value in TRAIN.model_dump(exclude_defaults=True).items()]
    settings += [f"sequence_length={LENGTH}", "device=cpu", "held_out_share=0.3"]
    return [*map(str, given), *(part for setting in settings for part in ("--set", setting))]


def test_two_processes_with_fsdp_give_the_run_of_one(model_folder: Path, data: Path, tmp_path: Path) -> None:
    alone = run_preference(config(model_folder, data, "kto"), tmp_path / "1")["comparison"]
    given = verb("dpo", "--model", model_folder, "--data", data, "--out", tmp_path / "2", "--loss", "kto")
    run_verb(2, "tune", *given)
    both = json.loads((tmp_path / "2" / "comparison.json").read_text())
    rows = [read_metrics(tmp_path / str(processes) / "metrics.jsonl") for processes in (1, 2)]
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "margin", "accuracy", "kto_divergence", "kl", "held_out_margin"):
            assert one.get(key, 0.0) == pytest.approx(two.get(key, 0.0), abs=1e-3), key
    assert alone["model"]["margin"]["mean"] == pytest.approx(both["model"]["margin"]["mean"], abs=1e-2)


def test_the_control_and_a_task_are_measured_beside_it(model_folder: Path, data: Path, tmp_path: Path) -> None:
    asked = ["--task", "addition", "--set", "ask.problems=8", "--set", "ask.levels=[1]", "--set", "ask.samples=2"]
    given = verb("dpo", "--model", model_folder, "--data", data, "--out", tmp_path / "out", "--control", *asked)
    result = RUNNER.invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0
    assert "model - control" in result.stdout and "greedy" in result.stdout and "accuracy" in result.stdout
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(comparison) == {"held_out", "start", "model", "control", "model - start", "model - control"}
    spent = [read_metrics(tmp_path / "out" / name / "metrics.jsonl")[-1] for name in (".", "control")]
    assert spent[0]["tokens"] < spent[1]["tokens"] < 2 * spent[0]["tokens"], "the reference's pass is paid for too"


def test_kto_learns_from_answers_that_have_no_partner(model_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    single = []
    for index, pair in enumerate(pairs()):
        answer = (pair.chosen, pair.rejected)[index % 2]
        single.append(Record(id=pair.id, kind="unpaired", messages=(*pair.messages, *answer), label=index % 2 == 0))
    write_records(tmp_path / "single.jsonl", single)
    write_records(tmp_path / "held.jsonl", pairs(60)[40:])
    given = config(model_folder, tmp_path / "single.jsonl", "kto", held_out=tmp_path / "held.jsonl")
    done = run_preference(given, tmp_path / "out")
    assert done["comparison"]["model - start"]["margin"]["low"] > 0
    with pytest.raises(LiaoyuanError, match="is of the kind 'unpaired'"):
        run_preference(given.model_copy(update={"preference": PreferenceLoss()}), tmp_path / "refused")


def test_what_cannot_be_learned_from_is_said(model_folder: Path, data: Path, tmp_path: Path) -> None:
    good = config(model_folder, data)

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(LiaoyuanError, match=match):
            run_preference(PreferenceConfig.model_validate(good.model_dump() | changed), tmp_path / "out")

    refused("which pp and cp cut", layout={"pp": 2})
    refused("belong to the cross-entropy", train=TRAIN.model_dump() | {"z_loss": 0.1})
    refused(r"do not fit in a row.*skip_long", sequence_length=16, train=TRAIN.model_dump() | {"batch_tokens": 64})
    refused("leaves 40 to learn from and 0", held_out_share=1e-6)
    refused("no task 'addiction'.*did you mean 'addition'", ask={"task": "addiction"})
    chat = tmp_path / "chat.jsonl"
    write_records(chat, [Record(id="seven", messages=turns("a", "b"))])
    refused("Record 'seven' is of the kind 'chat'", data=chat)
    silent = turns("b", "c")[1].model_copy(update={"weight": 0.0})
    write_records(chat, [pairs(1)[0].model_copy(update={"id": "eight", "chosen": (silent,)})])
    refused("Record 'eight' has an answer of no weight", data=chat)
    for given, named in (
        (["--loss", "dop"], "preference.loss"),
        (["--set", "preference.label_smoothing=0.1", "--loss", "ipo"], "a setting of dpo, not of ipo"),
        (["--set", "preference.beta=-1"], "preference.beta"),
        (["--set", "preference.bata=1"], "did you mean 'beta'"),
    ):
        with pytest.raises(LiaoyuanError, match=named):
            RUNNER.invoke(
                app, ["dpo", "--model", str(model_folder), "--data", str(data), *given], catch_exceptions=False
            )


def test_records_that_are_too_long_are_left_out_if_the_user_agrees(tokenizer: Tokenizer) -> None:
    from liaoyuan.tuning.preference_batches import fitting

    items = judge(tokenizer, pairs(9), True)
    limit = sorted(item.size for item in items)[4]
    assert [item.size <= limit for item in items].count(True) == len(fitting(items, limit, skip=True)) >= 5


def test_a_reward_model_is_an_ordinary_model_folder(model_folder: Path, data: Path, tmp_path: Path) -> None:
    held_out, out = tmp_path / "held_out.jsonl", tmp_path / "out"
    write_records(held_out, pairs(60)[40:])
    given = verb("reward", "--model", model_folder, "--data", data, "--out", out, "--held-out", held_out)
    assert RUNNER.invoke(app, given, catch_exceptions=False).exit_code == 0
    mark = json.loads((out / "model" / "liaoyuan_reward.json").read_text())["mark"]
    model, items = load_model(out / "model"), judge(Tokenizer.load(out / "model"), pairs(60)[40:], True)
    rewards = torch.tensor(log_odds_of(model, mark, [one.tokens for item in items for one in item.answers]))
    better = rewards[0::2] - rewards[1::2]
    reading = read_reading(out / "model")
    assert reading.middle == pytest.approx(float(rewards.mean()), abs=1e-3) and not reading.thoughts
    comparison = json.loads((out / "comparison.json").read_text())
    assert float(better.mean()) == pytest.approx(comparison["model"]["margin"]["mean"], rel=1e-4)
    assert float((better > 0).float().mean()) > 0.7 > comparison["start"]["accuracy"]["mean"]


DATA = Path(os.environ.get("LIAOYUAN_DATA", ROOT.parent / "shared" / "data"))
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_public_preferences_are_judged_by_their_answers_alone(language: str, tokenizer: Tokenizer) -> None:
    path = DATA / "sft" / f"dpo_{language}.jsonl.zst"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    records = []
    for number, line in itertools.islice(read_lines(path), 20):
        row = json.loads(line)
        said = {side: (Message(role="assistant", content=row[side]["value"]),) for side in ("chosen", "rejected")}
        asked = tuple(Message(role=ROLES[one["from"]], content=one["value"]) for one in row["conversations"])  # type: ignore[arg-type]
        records.append(Record(id=str(number), kind="preference", messages=asked, **said))
    for record, item in zip(records, judge(tokenizer, records, True), strict=True):
        for answer, side in zip(item.answers, (record.chosen, record.rejected), strict=True):
            text = tokenizer.decode([one for one, weight in zip(answer.tokens, answer.weights, strict=True) if weight])
            assert text.strip() == side[0].content.strip()


def test_pairs_in_other_layouts_are_learned_and_bad_lines_left_out_on_demand(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": one.messages[-1].content, "chosen": one.chosen[0].content, "rejected": one.rejected[0].content}
        for one in pairs()
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join([*map(json.dumps, rows), "{"]))
    given = ["dpo", "--model", str(model_folder), "--data", str(data), "--out", str(tmp_path / "out"), "--json"]
    settings = [part for one in ("train.steps=1", "train.batch_tokens=256", "device=cpu") for part in ("--set", one)]
    given += [*settings, "--set", "sequence_length=128"]
    with pytest.raises(LiaoyuanError, match=r"1 of \d+ lines are bad: line \d+: expected JSON"):
        RUNNER.invoke(app, given, catch_exceptions=False)
    result = RUNNER.invoke(app, [*given, "--skip-bad"], catch_exceptions=False)
    assert json.loads(result.stdout.splitlines()[-1])["left_out"] == 1
