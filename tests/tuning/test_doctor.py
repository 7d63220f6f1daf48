"""The doctor names what is wrong with a run while it runs: every finding is provoked in a real one."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liaoyuan.data import Tokenizer
from liaoyuan.inference import Completion, Proof
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.tasks import Problem, Rollout, Score, Split
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.doctor import FINDINGS, Doctor, Finding, diagnose
from liaoyuan.tuning.rollout import completions_of

CONFIG = ReinforceConfig(
    levels=(1,), steps=30, problems=4, group=8, max_tokens=1, learning_rate=1e-2, warmup_steps=0, minimum_groups=1
)
Judge = Callable[[Rollout, list[int]], Score]


class Tokens:
    """A task whose answers are read token by token; what they are worth is for a `Judge`."""

    name = "addition"
    levels = range(1, 2)

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        return Problem("addition", f"{index % 7}+{level}=?", "x", "", level, f"{index}")

    def check(self, problem: Problem, text: str) -> Score:
        raise AssertionError("the judge judges")


class Run:
    """A tiny run, in which `judge` is shown the tokens of each answer, and answers are read as `text`."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.model, self.tokenizer, self.folder, self.patch = model, tokenizer, folder, patch
        self.notes = list[str]()

    def __call__(
        self,
        judge: Judge,
        text: Callable[[Problem, list[int]], str] = lambda problem, tokens: str(tokens),
        validate: Any = None,
        until: int | None = None,
        **settings: Any,
    ) -> dict[str, Finding]:
        def read(_: Tokenizer, problem: Problem, answer: Completion) -> Rollout:
            return Rollout(problem, "", text(problem, answer.tokens), json.dumps(answer.tokens))

        class Reward:
            name = "judge"

            def __call__(self, rollout: Rollout) -> Score:
                return judge(rollout, json.loads(rollout.flaw))

        def note(progress: Progress) -> None:
            self.notes += [progress.note] if progress.note else []

        self.patch.setattr("liaoyuan.tuning.rollout.read_rollout", read)
        config = CONFIG.model_copy(update=settings)
        reinforce(self.model, self.tokenizer, Tokens(), config, self.folder, note, validate, until, Reward())
        rows = read_metrics(self.folder / FINDINGS)
        assert len(self.notes) == len({row["step"] for row in rows})
        found = {}
        for row in rows:
            found[row["name"]] = Finding(row["name"], row["severity"], row["what"], row["do"])
        return found

    def even_tokens_end(self) -> None:
        """Let half of all tokens end an answer, as a random model hardly ever does."""
        self.patch.setattr(self.tokenizer, "eos_ids", tuple(range(0, self.tokenizer.vocab_size, 2)))


@pytest.fixture
def run(small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(small_model, tokenizer, tmp_path, monkeypatch)


def right_if(holds: bool, read: str = "read") -> Score:
    return Score(float(holds), read, "" if holds else "not it")


def is_even(rollout: Rollout, tokens: list[int]) -> Score:
    return right_if(tokens[0] % 2 == 0, rollout.text)


def test_nothing_is_right(run: Run) -> None:
    found = run(lambda *_: right_if(False), steps=12)
    assert found["all_wrong"].severity == "error" and "100%" in found["all_wrong"].what
    assert found["no_update"].severity == "error"
    assert "rl.levels" in found["all_wrong"].do and "all_right" not in found


def test_everything_is_right(run: Run) -> None:
    found = run(lambda *_: right_if(True), steps=12)
    assert "harder levels" in found["all_right"].do and "all_wrong" not in found


def test_answers_meet_the_limit_of_tokens(run: Run) -> None:
    found = run(is_even, steps=12)  # a random model hardly ever ends its turn
    assert found["truncated"].severity == "error" and "rl.max_tokens" in found["truncated"].do


def test_no_answer_is_found(run: Run) -> None:
    run.even_tokens_end()
    found = run(lambda _, tokens: Score(float(tokens[0] % 2 == 0)), steps=16)
    assert found["unparsed"].severity in ("warning", "error") and "rollouts/" in found["unparsed"].do


def test_the_policy_is_far_from_where_it_began(run: Run) -> None:
    found = run(lambda _, tokens: right_if(tokens[0] % 16 == 0), problems=8)
    assert "nats a token from the one" in found["far_from_start"].what


def test_a_reward_gives_no_value(run: Run) -> None:
    found = run(lambda _, tokens: Score(None, None, "it raised") if tokens[0] % 3 else right_if(tokens[0] % 2 == 0))
    assert found["unjudged"].severity == "error" and "rollouts/" in found["unjudged"].do


def test_entropy_collapses_while_the_reward_stands_still(run: Run) -> None:
    """Updates that are too large for a reward that cannot be learned: noise decides."""
    chance = random.Random(0)
    found = run(lambda *_: right_if(chance.random() < 0.5), steps=34, learning_rate=5e-2, decay=0.0, clip=10.0)
    assert "nats a token" in found["entropy_collapse"].what


def test_wrong_answers_grow(run: Run) -> None:
    """Length is paid, and nothing is ever right."""
    run.even_tokens_end()
    found = run(lambda _, tokens: Score(len(tokens) / 48, "read"), steps=24, max_tokens=24)
    assert "dr_grpo" in found["wrong_answers_grow"].do


def test_rollouts_are_not_what_training_computes(run: Run) -> None:
    def off(*arguments: Any) -> list[Completion]:
        return [replace(one, logprobs=[x - 0.1 for x in one.logprobs]) for one in completions_of(*arguments)]

    run.patch.setattr("liaoyuan.tuning.rollout.completions_of", off)
    found = run(is_even, steps=3)
    assert found["ratio_gap"].severity in ("warning", "error") and "1.0e-01" in found["ratio_gap"].what


def test_truncated_weights_switch_on_by_themselves_where_rollouts_are_not_proven_exact(run: Run) -> None:
    run.patch.setattr(Proof, "exact", False)
    found = run(is_even, steps=3)
    assert found["corrected"].severity == "note" and "truncated importance weights are on" in found["corrected"].what
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert all(row["corrected"] and "log_prob_gap" in row for row in rows)


def test_a_gradient_is_much_larger_than_usual(run: Run) -> None:
    calls = 0

    def judge(_: Rollout, tokens: list[int]) -> Score:
        nonlocal calls
        calls += 1
        return Score((100.0 if calls > 25 * 32 else 1.0) * (tokens[0] % 2), "read")

    found = run(judge, steps=27, advantage="dr_grpo", learning_rate=1e-4)
    assert "gradient's norm" in found["gradient_spike"].what


def test_the_reward_rises_while_what_is_checked_falls(run: Run) -> None:
    def validate(_: Decoder) -> dict[str, float]:
        """Odd answers are the right ones."""
        rows = read_metrics(run.folder / "metrics.jsonl")
        return {"validation_greedy": 0.0, "validation_sampled": 1.0 - rows[-1]["reward"] if rows else 0.5}

    found = run(is_even, validate=validate, validate_every=8, steps=32)
    assert found["reward_without_accuracy"].severity == "error"


def test_one_answer_is_given_to_all_problems(run: Run) -> None:
    found = run(is_even, text=lambda _, tokens: "7" if tokens[0] % 2 == 0 else str(tokens))
    assert "one and the same answer" in found["one_answer"].what


def test_answers_are_copied_from_the_question(run: Run) -> None:
    found = run(is_even, text=lambda problem, tokens: problem.question[:3] if tokens[0] % 2 == 0 else "no")
    assert "copied from the question" in found["copied"].what


def test_the_reward_falls(run: Run) -> None:
    calls = 0

    def judge(_: Rollout, tokens: list[int]) -> Score:
        nonlocal calls
        calls += 1
        return right_if(tokens[0] % 2 == (calls > 20 * 32))

    assert "rl.learning_rate" in run(judge, steps=31, decay=0.0)["reward_falls"].do


def test_a_long_run_says_how_long(run: Run) -> None:
    found = run(is_even, steps=10_000_000, until=12)
    assert (
        "hours more" in found["time_left"].what and read_metrics(run.folder / "metrics.jsonl")[-1]["seconds_left"] > 0
    )


def test_a_good_run_is_left_alone(run: Run) -> None:
    run.even_tokens_end()
    found = run(
        lambda rollout, tokens: right_if(tokens[0] % 4 == 0, rollout.text), steps=20, learning_rate=1e-3, max_tokens=8
    )
    assert found == {}


def test_a_finding_is_told_once_until_it_becomes_worse_or_returns_and_a_resumed_run_remembers(tmp_path: Path) -> None:
    def row(step: int, share: float) -> dict[str, Any]:
        return {"step": step, "reward": 0.0, "updates": 1, "all_wrong": share}

    shares = [0.7] * 20 + [1.0] * 20 + [0.0] * 30 + [0.8] * 20
    doctor = Doctor(tmp_path)
    told = [(step, one.severity) for step, share in enumerate(shares) for one in doctor.look(row(step, share))]
    assert [severity for _, severity in told] == ["warning", "error", "warning"]
    assert [found["step"] for found in read_metrics(tmp_path / FINDINGS)] == [step for step, _ in told]
    before = (tmp_path / FINDINGS).read_bytes()
    lines = (json.dumps(row(step, share)) + "\n" for step, share in enumerate(shares))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    for resumed_from in (5, 15, 45, 80):
        again = Doctor(tmp_path, resumed_from)
        for step, share in enumerate(shares[resumed_from:], resumed_from):
            again.look(row(step, share))
        assert (tmp_path / FINDINGS).read_bytes() == before


def test_findings_are_functions_of_the_rows() -> None:
    rows = [{"step": step, "all_wrong": 0.95, "updates": 0} for step in range(10)]
    assert diagnose(rows[:9]) == []
    assert [finding.name for finding in diagnose(rows)] == ["all_wrong", "no_update"]
