"""Distillation: the losses on bandits whose optimum is known, and a student that comes to answer as its teacher."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.cli.tune import app
from liaoyuan.data import Tokenizer, train_tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.tasks import Right
from liaoyuan.tasks.seen import Seen, read_seen
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.card import read_card
from liaoyuan.tuning.doctor import diagnose
from liaoyuan.tuning.losses import clipped_losses, generalised_divergence, teacher_advantages
from liaoyuan.tuning.packing import pack
from liaoyuan.tuning.policy_log_probs import policy_hidden, policy_log_probs
from liaoyuan.tuning.rl_run import RlConfig
from liaoyuan.tuning.rollout import Rollouts, roll_out
from liaoyuan.tuning.rollout_log import read_rollouts
from liaoyuan.tuning.teacher import advise, divergences, open_teacher
from liaoyuan.tuning.update import by_token, lesson_of, packs_of
from liaoyuan.tuning.validation import tuning_engine
from tests.conftest import randomised
from tests.tuning.test_reinforce import EndSoon, weights

TEACHER = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
CONFIG = ReinforceConfig(
    levels=(1,), steps=6, problems=4, group=4, max_tokens=6, learning_rate=1e-3, warmup_steps=0, checkpoint_every=2,
    advantage="none", teacher_weight=1.0,
)  # fmt: skip
RUNNER = CliRunner()


def test_a_bandit_learns_its_teachers_distribution_from_its_own_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for step in range(300):
        before = logits.detach().log_softmax(0)
        arms = torch.multinomial(before.exp(), 64, replacement=True, generator=generator)
        for _ in range(2):  # the second is off policy
            found = teacher_advantages(TEACHER.log()[arms], before[arms])
            losses = clipped_losses(logits.log_softmax(0)[arms] - before[arms], found)
            (gradient,) = torch.autograd.grad(losses.mean(), logits)
            with torch.no_grad():
                logits -= (1.0 - step / 300) * gradient
    torch.testing.assert_close(logits.detach().softmax(0), TEACHER, atol=0.03, rtol=0)


def test_the_expected_gradient_of_sampled_tokens_is_that_of_the_reverse_divergence() -> None:
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    losses = clipped_losses(policy - policy.detach(), teacher_advantages(TEACHER.log(), policy))
    (sampled,) = torch.autograd.grad((policy.detach().exp() * losses).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(generalised_divergence(policy, TEACHER.log(), 1.0), logits)
    torch.testing.assert_close(sampled, exact)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_every_divergence_is_least_at_the_teacher_and_has_its_gradient(beta: float) -> None:
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(generalised_divergence(logits.log_softmax(0), TEACHER.log(), beta), logits)
        with torch.no_grad():
            logits -= 5.0 * gradient
    torch.testing.assert_close(logits.detach().softmax(0), TEACHER, atol=1e-3, rtol=0)
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 5, dtype=torch.float64).log_softmax(-1)
    assert gradcheck(lambda x: generalised_divergence(x.log_softmax(-1), other, beta), (scores,))


def test_a_student_that_cannot_be_its_teacher_spreads_or_keeps_to_one_of_its_modes() -> None:
    """The student's middle arm is never more probable than both others; the teacher never takes it."""
    teacher = torch.tensor([0.55, 0.01, 0.44], dtype=torch.float64).log()

    def student(place: Tensor) -> Tensor:  # one parameter: a hill of fixed width around `place`
        return (-2.0 * (torch.arange(3, dtype=torch.float64) - place).square()).log_softmax(0)

    places = torch.linspace(-1, 3, 401, dtype=torch.float64)
    best = {}
    for beta in (0.0, 1.0):
        values = torch.stack([generalised_divergence(student(place), teacher, beta) for place in places])
        best[beta] = float(places[values.argmin()])
    assert 0.6 < best[0.0] < 1.1  # between the two
    assert best[1.0] < 0.2  # at the likelier one


def sure_of_itself(model: Decoder, by: float = 2.0) -> Decoder:
    """A random teacher with clear preferences."""
    teacher = randomised(model.config, seed=4)
    with torch.no_grad():
        teacher.norm.weight *= by
    return teacher.eval()


def rolled(model: Decoder, tokenizer: Tokenizer, count: int = 4) -> Rollouts:
    problems = [EndSoon().problem(0, place, 1) for place in range(count)]
    return roll_out(tuning_engine(model, 6), tokenizer, Right(EndSoon()), problems, 4, 3, 6)


def test_advantages_are_the_teachers_log_probabilities_less_the_students(
    small_model: Decoder, tokenizer: Tokenizer
) -> None:
    teacher, rollouts = sure_of_itself(small_model), rolled(small_model, tokenizer)
    packs = packs_of(rollouts, lesson_of(rollouts, CONFIG), CONFIG, torch.device("cpu"))
    advised, measures = advise(teacher, packs, CONFIG.model_copy(update={"teacher_weight": 0.5}))
    parts = list(itertools.chain(*advised))
    for part in parts:
        with torch.no_grad():
            logits = teacher(part.tokens, part.positions, part.context, rows=part.rows)
        expected = logits.log_softmax(-1).gather(1, part.targets[:, None])[:, 0] - part.rollout_log_probs
        torch.testing.assert_close(part.advantages, 0.5 * expected, atol=2e-5, rtol=1e-4)
    mean = torch.cat([part.advantages for part in parts]).mean()
    assert measures["teacher_divergence"] == pytest.approx(-2.0 * float(mean), rel=1e-4)
    learned = sum(len(part.rows) for part in parts)
    assert learned == rollouts.generated_tokens  # of every answer, right or wrong
    answers = torch.cat([part.advantages for part in parts]).split([len(one.tokens) for one in rollouts.completions])
    kept = by_token(lesson_of(rollouts, CONFIG), advised).advantages.flatten()  # in the files of rollouts
    torch.testing.assert_close(kept, torch.stack([one.mean() for one in answers]))


def test_whole_distributions_are_compared_at_each_token(
    small_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liaoyuan.tuning.teacher.CHUNK", 7 * small_model.config.vocab_size)  # the last chunk is short
    teacher, rollouts = sure_of_itself(small_model), rolled(small_model, tokenizer)
    (part,) = pack(rollouts, torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool), torch.device("cpu"))
    config = ReinforceConfig.model_validate(CONFIG.model_dump() | {"teacher_loss": "whole", "beta": 0.3})
    found = divergences(small_model, policy_hidden(small_model, part), teacher, part, config)
    both = [
        model(part.tokens, part.positions, part.context, rows=part.rows).log_softmax(-1)
        for model in (small_model, teacher)
    ]
    expected = generalised_divergence(*both, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    gradients = []
    for values in (found, expected):
        small_model.zero_grad()
        values.sum().backward()
        gradients.append([p.grad.clone() for p in small_model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"max_tokens": 1, "group": 16, "update_group": 16, "problems": 4}, {"max_tokens": 3, "teacher_loss": "whole"}],
    ids=["sampled", "whole"],
)
def test_a_student_comes_to_answer_as_its_teacher(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, settings: dict[str, Any]
) -> None:
    teacher = sure_of_itself(small_model)
    sizes = {"steps": 40, "learning_rate": 1e-2, "problems": 16, "minibatches": 1}
    config = ReinforceConfig.model_validate(CONFIG.model_dump() | sizes | settings)
    reinforce(small_model, tokenizer, EndSoon(), config, tmp_path, teacher=teacher)
    apart = [row["teacher_divergence"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert sum(apart[-5:]) / 5 < 0.5 * apart[0]
    row = read_rollouts(tmp_path / "rollouts/000000.jsonl.zst")[0]
    assert row["advantage"] is not None and row["reward"] == 0.0


def test_a_reward_may_teach_beside_the_teacher(small_model: Decoder, tokenizer: Tokenizer) -> None:
    teacher, rollouts = sure_of_itself(small_model), rolled(small_model, tokenizer)
    rollouts.rewards[:2, :2] = 1.0
    both = ReinforceConfig.model_validate(CONFIG.model_dump() | {"advantage": "grpo"})
    lesson = lesson_of(rollouts, both)
    assert lesson.groups.all() and lesson.samples.all() and lesson.advantages[:2].all()
    cpu = torch.device("cpu")
    plain, alone = (list(itertools.chain(*packs_of(rollouts, lesson, c, cpu))) for c in (both, CONFIG))
    advised = itertools.chain(*advise(teacher, [alone], CONFIG)[0])
    for part, other in zip(plain, advised, strict=True):
        said = policy_log_probs(teacher, part, both).detach() - part.rollout_log_probs
        torch.testing.assert_close(other.advantages, part.advantages + said)


@pytest.fixture
def teacher_folder(small_model: Decoder, tokenizer_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    save_model(sure_of_itself(small_model), folder, tokenizer_folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"teacher_loss": "whole", "beta": 0.5}], ids=str)
def test_a_killed_run_ends_bit_for_bit_as_one_never_interrupted(
    model_folder: Path, tokenizer: Tokenizer, teacher_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = ReinforceConfig.model_validate(CONFIG.model_dump() | settings)
    teacher = open_teacher(teacher_folder, model_folder, torch.device("cpu"))

    def kill(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    whole, resumed = load_model(model_folder), load_model(model_folder)
    reinforce(whole, tokenizer, EndSoon(), config, tmp_path / "whole", teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        reinforce(load_model(model_folder), tokenizer, EndSoon(), config, tmp_path / "killed", kill, teacher=teacher)
    reinforce(resumed, tokenizer, EndSoon(), config, tmp_path / "killed", teacher=teacher)
    assert torch.equal(weights(whole), weights(resumed)) and not torch.equal(
        weights(whole), weights(load_model(model_folder))
    )
    for path in (tmp_path / "whole/rollouts").iterdir():
        assert (tmp_path / "killed/rollouts" / path.name).read_bytes() == path.read_bytes()


def test_a_teacher_of_another_vocabulary_is_refused(model_folder: Path, teacher_folder: Path) -> None:
    train_tokenizer(["other words", "so other"], 263 + 8).save(teacher_folder)
    with pytest.raises(LiaoyuanError, match=r"cannot teach .*: token \d+ is .* need one vocabulary"):
        open_teacher(teacher_folder, model_folder, torch.device("cpu"))


def test_the_verb_compares_student_teacher_and_result(model_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    Seen(teacher_folder).add([EndSoon().problem(0, 3, 1)])
    out = tmp_path / "out"
    sizes = ["rl.levels=[1]", "rl.steps=2", "rl.problems=2", "rl.max_tokens=8"]
    few = ["validation_problems=4", "test_problems=6", "test_samples=2", "device=cpu"]
    settings = [part for one in (*sizes, *few) for part in ("--set", one)]
    given = ["distill", "--model", str(model_folder), "--teacher", str(teacher_folder), "--out", str(out), *settings]
    result = RUNNER.invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0 and "its teacher" in result.stdout
    found = json.loads((out / "result.json").read_text())
    assert list(found["accuracy"]) == ["start", "teacher", "model", "difference"] and found["updates"] == 2
    card = read_card(out / "model")
    assert card["method"] == f"on-policy distillation from {teacher_folder} on addition (full)"
    assert card["command"].startswith("liaoyuan tune distill ") and "test" in card["controls"]["the teacher"]
    assert set(read_seen(teacher_folder)) <= set(read_seen(out / "model"))  # the student may know it too
    again = RUNNER.invoke(app, [*given, "--set", "rl.teacher_weight=2.0"])
    assert "rl.teacher_weight = 1.0, not 2.0" in str(again.exception)


def test_mistakes_are_sentences(model_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(teacher_folder)
    model = ["--model", str(model_folder), "--out", str(tmp_path / "out")]
    cases = [
        (["distill", *model], "give --teacher DIR"),
        (["distill", *model, "--teacher", str(teacher_folder)], "There is no folder"),
        (["rl", *model, "--set", "rl.teacher_weight=1.0"], "give teacher, a folder"),
        (["rl", *model, "--set", "rl.teacher_loss=whole"], "give teacher, a folder"),
        (["rl", *model, "--set", "rl.advantage=none"], "nothing would be learned"),
        (["rl", *model, "--set", "rl.group=1"], "group must be 2 or more"),
        (["distill", *model, "--teacher", "x", "--set", "rl.beta=0.5"], "beta is a setting of teacher_loss = whole"),
    ]
    for given, words in cases:
        assert words in str(RUNNER.invoke(app, given).exception), given


def test_what_is_given_stands_beside_what_a_teacher_means() -> None:
    given = RlConfig(model=Path("m"), teacher=Path("t"), rl=ReinforceConfig(steps=3, advantage="grpo"))
    assert (given.rl.steps, given.rl.advantage, given.rl.teacher_weight) == (3, "grpo", 1.0)
    assert "levels" not in given.rl.model_fields_set  # so that the task's own are taken
    assert RlConfig.model_validate(given.model_dump()) == given


def test_a_student_that_does_not_come_nearer_is_told(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = ReinforceConfig.model_validate(CONFIG.model_dump() | {"steps": 20, "learning_rate": 1e-9})
    teacher = sure_of_itself(small_model, by=4.0)
    reinforce(small_model, tokenizer, EndSoon(), config, tmp_path, teacher=teacher)
    found = {finding.name: finding for finding in diagnose(read_metrics(tmp_path / "metrics.jsonl"))}
    assert "hardly comes nearer" in found["far_from_teacher"].what and "chat template" in found["far_from_teacher"].do
