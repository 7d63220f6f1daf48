"""PPO with a critic: it learns what is rewarded, expects what will be earned, and goes on bit for bit with it."""

from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data import Tokenizer
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.tasks import Right, Rollout, Score
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.critic import Critic, explained_variance
from liaoyuan.tuning.doctor import diagnose
from liaoyuan.tuning.rollout import roll_out
from liaoyuan.tuning.rollout_log import read_rollouts
from liaoyuan.tuning.update import lesson_of, packs_of
from liaoyuan.tuning.validation import tuning_engine
from tests.tuning.test_reinforce import CONFIG, EndSoon, rewarding_even, weights

PPO = ReinforceConfig.model_validate(CONFIG.model_dump() | {"advantage": "gae"})


class EasyQuestions:
    """A reward that hangs on the question alone, so that all of it can be expected and nothing be learned."""

    name = "easy"

    def __call__(self, rollout: Rollout) -> Score:
        return Score(float(int(rollout.problem.question[0]) > 3), "x")


def config_of(**settings: object) -> ReinforceConfig:
    return ReinforceConfig.model_validate(PPO.model_dump() | settings)


def test_what_is_rewarded_is_learned_from_one_answer_to_each_problem(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    sizes = {"steps": 40, "problems": 32, "group": 1, "max_tokens": 2, "learning_rate": 1e-2, "decay": 0.5}
    reinforce(small_model, tokenizer, EndSoon(), config_of(**sizes), tmp_path)
    rewards = [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rewards[0] < 0.7 and sum(rewards[-10:]) / 10 > 0.75


def test_advantages_are_what_was_earned_beyond_what_was_expected(small_model: Decoder, tokenizer: Tokenizer) -> None:
    problems = [EndSoon().problem(0, place, 1) for place in range(4)]
    rollouts = roll_out(tuning_engine(small_model, 6), tokenizer, Right(EndSoon()), problems, 4, 3, 6)
    rollouts.rewards[:, :2] = torch.tensor([1.0, 0.5])
    config = config_of(gae_lambda=1.0)
    critic = Critic(small_model, config)
    torch.nn.init.normal_(critic.model.head.weight, std=0.3)
    packs = packs_of(rollouts, lesson_of(rollouts, config), config, torch.device("cpu"))
    appraised, told = critic.appraise(packs)
    ((before,), (after,)) = packs, appraised
    beyond = torch.cat([one.advantages - critic.model(one).detach() for one in before])
    found = torch.cat([one.advantages for one in after])
    torch.testing.assert_close(found, (beyond - beyond.mean()) / beyond.std(correction=0), atol=1e-5, rtol=1e-4)
    earned = torch.cat([one.advantages for one in before])
    for one, other in zip(after, before, strict=True):
        assert one.returns is not None
        torch.testing.assert_close(one.returns, other.advantages)  # lambda 1: all that was earned
    assert told["explained_variance"] == pytest.approx(1.0 - float(beyond.var() / earned.var()), rel=1e-4)
    assert sum(len(one.rows) for one in before) == rollouts.generated_tokens  # of every answer


def test_it_comes_to_expect_what_hangs_on_the_question(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of(steps=30, problems=8, max_tokens=2, critic_learning_rate=1e-2)
    reinforce(small_model, tokenizer, EndSoon(), config, tmp_path, reward=EasyQuestions())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # all values begin at 0
    assert sum(row["explained_variance"] for row in rows[-5:]) / 5 > 0.6
    assert "blind_critic" not in {finding.name for finding in diagnose(rows)}
    assert read_rollouts(tmp_path / "rollouts/000000.jsonl.zst")[0]["advantage"] is not None


def test_a_critic_that_learns_nothing_is_told(small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = config_of(steps=20, max_tokens=1, critic_learning_rate=1e-9)
    reinforce(small_model, tokenizer, EndSoon(), config, tmp_path, reward=EasyQuestions())
    found = {finding.name: finding for finding in diagnose(read_metrics(tmp_path / "metrics.jsonl"))}
    assert "rl.critic_learning_rate" in found["blind_critic"].do
    assert explained_variance(torch.ones(3), torch.rand(3)) == {}  # where all earn the same nothing is to explain


def test_a_killed_run_ends_bit_for_bit_as_one_never_interrupted(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)

    def kill(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    whole, resumed = load_model(model_folder), load_model(model_folder)
    reinforce(whole, tokenizer, EndSoon(), PPO, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        reinforce(load_model(model_folder), tokenizer, EndSoon(), PPO, tmp_path / "killed", kill)
    reinforce(resumed, tokenizer, EndSoon(), PPO, tmp_path / "killed")
    assert torch.equal(weights(whole), weights(resumed))
    states = [tmp_path / name / "state/step-000006" for name in ("whole", "killed")]
    tensors = [sorted(path for path in state.rglob("*.safetensors")) for state in states]
    assert [path.read_bytes() for path in tensors[0]] == [path.read_bytes() for path in tensors[1]]
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert len({tuple(row["explained_variance"] for row in some) for some in rows}) == 1
