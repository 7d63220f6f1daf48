"""Reinforcement learning: it learns what is rewarded, resumes bit for bit, and rollouts agree with training."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import completions_of
from liaoyuan.inference import QUICK, Completion, Engine, prove
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.tasks import Problem, Right, Rollout, Score, Split, find_task
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.controls import own_samples
from liaoyuan.tuning.packing import pack
from liaoyuan.tuning.reinforce import result_of
from liaoyuan.tuning.rollout import roll_out
from liaoyuan.tuning.update import minibatches
from liaoyuan.tuning.validation import tuning_engine
from tests.verbs import Verb

CONFIG = ReinforceConfig(
    levels=(1,), steps=6, problems=4, group=8, max_tokens=6, learning_rate=1e-3, warmup_steps=0, checkpoint_every=2
)


class EndSoon:
    """A task with one answer, which `rewarding_even` lets a random model give now and then."""

    name = "addition"
    levels = range(1, 2)

    def problem(self, seed: int, index: int, level: int, split: Split = "train") -> Problem:
        return Problem("addition", f"{index % 7}+{level}=?", "x", "", level, f"{index}")

    def check(self, problem: Problem, text: str) -> Score:
        return Score(float(text == problem.answer), text)


def weights(model: Decoder) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def even_is_right(_: Tokenizer, problem: Problem, answer: Completion) -> Rollout:
    """Read completions whose first token is even as the right answer: half of them at first, all after learning."""
    return Rollout(problem, "", "-" if answer.tokens[0] % 2 else problem.answer)


def rewarding_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liaoyuan.tuning.rollout.read_rollout", even_is_right)


def test_learns_what_is_rewarded(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    config = CONFIG.model_copy(update={"steps": 60, "learning_rate": 1e-2, "max_tokens": 1})
    reinforce(small_model, tokenizer, EndSoon(), config, tmp_path)
    rewards = [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rewards[0] < 0.7
    assert sum(rewards[-5:]) / 5 > 0.9


def test_rollout_and_training_log_probabilities_agree(small_model: Decoder, tokenizer: Tokenizer) -> None:
    problems = [EndSoon().problem(0, place, 1) for place in range(5)]
    rollouts = roll_out(tuning_engine(small_model, 8), tokenizer, Right(EndSoon()), problems, 4, 3, 8)
    kept = torch.ones(5, 4, dtype=torch.bool)
    kept[1], kept[3, 2] = False, False
    advantages = torch.arange(20.0).view(5, 4)
    (packed,) = pack(rollouts, advantages, kept, torch.device("cpu"))
    read = (packed.tokens, packed.positions, packed.context)
    found = small_model(*read, targets=packed.targets, rows=packed.rows).detach()
    if prove(small_model, QUICK).exact:
        ratio = (found - packed.rollout_log_probs).exp()
        assert torch.equal(ratio, torch.ones_like(ratio))
    torch.testing.assert_close(found, packed.rollout_log_probs, atol=1e-5, rtol=0)
    generated = [one.tokens for place, one in enumerate(rollouts.completions) if kept[place // 4, place % 4]]
    assert packed.targets.tolist() == [token for tokens in generated for token in tokens]
    per_token = [
        float(place) for place in range(20) if kept[place // 4, place % 4] for _ in rollouts.completions[place].tokens
    ]
    assert packed.advantages.tolist() == per_token
    prompts = sum(len(rollouts.prompts[place]) for place in (0, 2, 3, 4))
    answers = sum(len(tokens) - 1 for tokens in generated)
    assert len(packed.tokens) == prompts + answers  # a prompt is read once for all answers to it


def test_rollouts_that_do_not_fit_at_once_are_packed_in_turns(
    small_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [EndSoon().problem(0, place, 1) for place in range(3)]
    rollouts = roll_out(tuning_engine(small_model, 8), tokenizer, Right(EndSoon()), problems, 4, 3, 8)
    monkeypatch.setattr("liaoyuan.tuning.packing.MICROBATCH_TOKENS", 33)
    packs = list(pack(rollouts, torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.device("cpu")))
    assert len(packs) > 3 and all(len(one.tokens) <= 33 for one in packs)
    targets = [token for one in packs for token in one.targets.tolist()]
    assert targets == [token for completion in rollouts.completions for token in completion.tokens]
    for one in packs:
        found = small_model(one.tokens, one.positions, one.context, targets=one.targets, rows=one.rows).detach()
        torch.testing.assert_close(found, one.rollout_log_probs, atol=1e-5, rtol=0)


def test_a_run_proves_its_rollouts_exact_and_the_first_update_of_each_step_finds_no_gap(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    done = reinforce(small_model, tokenizer, EndSoon(), CONFIG, tmp_path)
    gaps = [row["log_prob_gap"] for row in read_metrics(tmp_path / "metrics.jsonl") if "log_prob_gap" in row]
    assert gaps and done.exact == prove(small_model, QUICK).exact
    assert max(gaps) == 0.0 or not done.exact


def test_a_killed_run_ends_bit_for_bit_as_one_never_interrupted(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_the_third(reader: Tokenizer, problem: Problem, answer: Completion) -> Rollout:
        """Its third level is never right, so it teaches nothing and is drawn less and less."""
        read = even_is_right(reader, problem, answer)
        return read if problem.level < 3 else replace(read, text="-")

    monkeypatch.setattr("liaoyuan.tuning.rollout.read_rollout", never_the_third)
    whole, config = load_model(model_folder), CONFIG.model_copy(update={"levels": (1, 2, 3)})
    done = reinforce(whole, tokenizer, EndSoon(), config, tmp_path / "whole")
    assert done.signal[2] < done.signal[0] == 1.0
    for kill_at in (1, 3, 5):
        folder = tmp_path / f"killed-{kill_at}"

        def kill(progress: Progress, kill_at: int = kill_at) -> None:
            if progress.done == kill_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reinforce(load_model(model_folder), tokenizer, EndSoon(), config, folder, kill)
        resumed = load_model(model_folder)
        again = reinforce(resumed, tokenizer, EndSoon(), config, folder)
        assert (again.drawn, again.signal) == (done.drawn, done.signal)
        assert torch.equal(weights(resumed), weights(whole))
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(6))
        assert [row["reward"] for row in rows] == [
            row["reward"] for row in read_metrics(tmp_path / "whole/metrics.jsonl")
        ]


def test_kill_minus_nine(model_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A process of its own is killed in the middle; what goes on from its folder equals an uninterrupted run."""
    program = (
        "import os, signal, sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from liaoyuan.checkpoint import load_model; from liaoyuan.data import Tokenizer\n"
        "from liaoyuan.tasks import find_task; from liaoyuan.tuning import ReinforceConfig, reinforce\n"
        "import liaoyuan.tuning.rollout as rollout; from tests.tuning.test_reinforce import even_is_right\n"
        "rollout.read_rollout = even_is_right\n"
        "start, folder, config = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
        "def report(p):\n    if p.done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "reinforce(load_model(start), Tokenizer.load(start), find_task('addition'),"
        " ReinforceConfig.model_validate_json(config), folder, report)\n"
    )
    arguments = [str(model_folder), str(tmp_path / "killed"), CONFIG.model_dump_json()]
    assert Verb(*arguments, program=program).wait(300) == -9
    models = {}
    with pytest.MonkeyPatch.context() as patch:
        rewarding_even(patch)
        for name in ("killed", "whole"):
            models[name] = load_model(model_folder)
            reinforce(models[name], tokenizer, find_task("addition"), CONFIG, tmp_path / name)
    assert torch.equal(weights(models["killed"]), weights(models["whole"]))


def test_a_step_without_signal_changes_nothing(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Right, "__call__", lambda *_: Score(0.0))
    before = weights(small_model).clone()
    done = reinforce(small_model, tokenizer, EndSoon(), CONFIG, tmp_path)
    assert torch.equal(weights(small_model), before)
    assert done.updates == 0
    assert done.generated_tokens > 0


def test_another_config_in_the_same_folder_is_refused(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reinforce(small_model, tokenizer, EndSoon(), CONFIG, tmp_path)
    other = CONFIG.model_copy(update={"group": 4})
    with pytest.raises(LiaoyuanError, match="group = 8, not 4"):
        reinforce(small_model, tokenizer, EndSoon(), other, tmp_path)


def test_a_run_that_cannot_begin_closes_what_it_has_opened(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    def fail(*_: object) -> None:
        raise LiaoyuanError("nothing to go on from")

    monkeypatch.setattr("liaoyuan.tuning.sources.LocalRollouts.load", fail)
    for place in ("tuning.sources.LocalRollouts.close", "tuning.doctor.Doctor.close", "rundir.Lock.release"):
        monkeypatch.setattr(f"liaoyuan.{place}", lambda _, place=place: closed.append(place.split(".")[-2]))
    with pytest.raises(LiaoyuanError, match="nothing to go on from"):
        reinforce(small_model, tokenizer, EndSoon(), CONFIG, tmp_path)
    assert closed == ["LocalRollouts", "Doctor", "Lock"]


def test_control_b_samples_the_very_problems_that_rl_drew(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def spy(engine: Engine, tokenizer: Tokenizer, problems: list[Problem], *rest: Any) -> list[Completion]:
        asked.append([problem.key for problem in problems])
        return completions_of(engine, tokenizer, problems, *rest)

    rewarding_even(monkeypatch)
    monkeypatch.setattr("liaoyuan.tuning.rollout.completions_of", spy)
    config = CONFIG.model_copy(update={"levels": (2, 3, 4)})
    done = reinforce(small_model, tokenizer, find_task("addition"), config, tmp_path)
    found = own_samples(small_model, tokenizer, find_task("addition"), config, done.drawn)
    assert len(asked) == 2 * config.steps and asked[: config.steps] == asked[config.steps :]
    assert found.problems == config.steps * config.problems
    assert result_of(json.loads(json.dumps(asdict(done)))) == done


def test_minibatches_take_every_group_with_signal_once() -> None:
    kept = torch.tensor([True, False, True, True, False, True, True])
    for most, groups, count in ((3, 1, 3), (20, 1, 5), (4, 2, 2), (4, 6, 1)):
        parts = list(minibatches(kept, most, groups))
        assert len(parts) == count
        assert torch.equal(torch.stack(parts).sum(0), kept.long())
        assert all(int(part.sum()) >= min(groups, 5) for part in parts)
