"""The variants of the loss by config: each learns what is rewarded, and corrections do what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Proof
from liaoyuan.models import Decoder
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks import Right
from liaoyuan.training import TrainConfig, make_optimiser
from liaoyuan.tuning import ReinforceConfig, reinforce
from liaoyuan.tuning.measures import kl_to
from liaoyuan.tuning.rollout import Rollouts, roll_out
from liaoyuan.tuning.update import learn, lesson_of, packs_of
from liaoyuan.tuning.validation import tuning_engine
from tests.conftest import randomised
from tests.tuning.test_reinforce import CONFIG, EndSoon, even_is_right, rewarding_even

VARIANTS: list[dict[str, Any]] = [
    {"advantage": "dr_grpo", "aggregation": "constant"},
    {"advantage": "rloo", "aggregation": "sequence"},
    {"advantage": "reinforce_pp"},
    {"ratio": "sequence", "aggregation": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    {"ratio": "cispo"},
]


def config_of(settings: dict[str, Any]) -> ReinforceConfig:
    return ReinforceConfig.model_validate(CONFIG.model_dump() | settings)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_each_variant_learns_what_is_rewarded(
    small_model: Decoder,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    rewarding_even(monkeypatch)
    config = config_of({"steps": 40, "learning_rate": 1e-2, "max_tokens": 2, "decay": 0.5} | settings)
    reinforce(small_model, tokenizer, EndSoon(), config, tmp_path)
    rewards = [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rewards[0] < 0.7 and sum(rewards[-10:]) / 10 > 0.75


def rolled(model: Decoder, tokenizer: Tokenizer) -> Rollouts:
    problems = [EndSoon().problem(0, place, 1) for place in range(6)]
    return roll_out(tuning_engine(model, 6), tokenizer, Right(EndSoon()), problems, 8, 3, 6)


def gradient(model: Decoder, rollouts: Rollouts, config: ReinforceConfig, corrected: bool = False) -> torch.Tensor:
    """Return the gradient of one update, flat."""
    config, found = config.model_copy(update={"minibatches": 1, "clip": 1e9}), list[torch.Tensor]()

    class Watch:
        def accumulate(self) -> None:
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append(torch.cat(gradients))
            model.zero_grad()

        def step(self, *_: Any) -> float:
            return 0.0

    packs = packs_of(rollouts, lesson_of(rollouts, config), config, torch.device("cpu"))
    learn(model, Watch(), packs, config, 1.0, corrected)  # type: ignore[arg-type]
    return torch.stack(found).sum(0)


def test_the_first_update_of_all_ratios_is_the_same_policy_gradient(
    small_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the policy itself every ratio is one; a sequence's has the same gradient where all are equally long."""
    rewarding_even(monkeypatch)
    monkeypatch.setattr(tokenizer, "eos_ids", ())  # no answer ends
    rollouts = rolled(small_model, tokenizer)
    plain = gradient(small_model, rollouts, CONFIG)
    assert plain.norm() > 0
    torch.testing.assert_close(gradient(small_model, rollouts, config_of({"ratio": "cispo"})), plain)
    by_sequence = gradient(small_model, rollouts, config_of({"ratio": "sequence", "aggregation": "sequence"}))
    torch.testing.assert_close(by_sequence, plain, atol=1e-6, rtol=1e-4)


def test_aggregations_are_one_where_all_answers_are_as_long_as_may_be(
    small_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    monkeypatch.setattr(tokenizer, "eos_ids", ())
    rollouts, found = rolled(small_model, tokenizer), {}
    for aggregation in ("token", "sequence", "constant"):
        found[aggregation] = gradient(small_model, rollouts, config_of({"aggregation": aggregation}))
    for aggregation in ("sequence", "constant"):
        torch.testing.assert_close(found[aggregation], found["token"], atol=1e-6, rtol=1e-4)


def test_corrected_updates_weigh_tokens_by_the_truncated_ratio(
    small_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts that say to be half as probable as they are count double, up to the cap."""
    rewarding_even(monkeypatch)
    rollouts = rolled(small_model, tokenizer)
    plain = gradient(small_model, rollouts, CONFIG)
    torch.testing.assert_close(gradient(small_model, rollouts, CONFIG, corrected=True), plain)
    for one in rollouts.completions:
        one.logprobs[:] = [x - torch.tensor(2.0).log().item() for x in one.logprobs]
    for cap, factor in ((4.0, 2.0), (1.5, 1.5)):
        config = config_of({"importance_cap": cap})
        torch.testing.assert_close(
            gradient(small_model, rollouts, config, corrected=True), factor * plain, atol=1e-6, rtol=1e-3
        )


def test_a_run_that_must_be_exact_ends_where_a_rollout_has_other_bits(
    small_model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(reader: Tokenizer, problem: Any, answer: Any) -> Any:
        answer.logprobs[0] -= 1e-6
        return even_is_right(reader, problem, answer)

    monkeypatch.setattr("liaoyuan.tuning.rollout.read_rollout", off)
    monkeypatch.setattr(Proof, "exact", True)
    with pytest.raises(LiaoyuanError, match="Rollouts of step 0 do not have training's bits"):
        reinforce(small_model, tokenizer, EndSoon(), CONFIG, tmp_path, must_be_exact=True)


def test_the_divergence_from_the_start_is_that_of_the_two_policies(small_model: Decoder, tokenizer: Tokenizer) -> None:
    problems = [EndSoon().problem(0, place, 1) for place in range(300)]
    engine = tuning_engine(small_model, 1)
    rollouts = roll_out(engine, tokenizer, Right(EndSoon()), problems, 2, 3, 1)
    assert kl_to(small_model, rollouts, CONFIG) == pytest.approx(0.0, abs=1e-9)
    other = randomised(small_model.config, seed=4)
    prompts = [torch.tensor(prompt) for prompt in rollouts.prompts[:7]]  # all others are the same
    exact = 0.0
    for prompt in prompts:
        mine, theirs = (_last(model, prompt) for model in (small_model, other))
        exact += float((mine.exp() * (mine - theirs)).sum()) / len(prompts)
    assert kl_to(other, rollouts, CONFIG) == pytest.approx(exact, rel=0.2)


def _last(model: Decoder, prompt: torch.Tensor) -> torch.Tensor:
    from liaoyuan.models import packed_context

    positions, context = packed_context([len(prompt)], torch.device("cpu"))
    with torch.no_grad():
        return model(prompt, positions, context)[-1].log_softmax(-1)


def test_how_many_tokens_are_clipped_is_counted(
    small_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    rollouts = rolled(small_model, tokenizer)
    for one, answer in zip(rollouts.completions, rollouts.answers, strict=True):  # as if rolled out by another policy
        is_right = answer.text == answer.problem.answer
        one.logprobs[:] = [x - 1.0 if is_right else x for x in one.logprobs]
    optimiser = make_optimiser(small_model, TrainConfig(steps=1))
    packs = packs_of(rollouts, lesson_of(rollouts, CONFIG), CONFIG, torch.device("cpu"))
    values = learn(small_model, optimiser, packs, CONFIG, 0.0)
    assert 0.2 < values["clipped_high"] < 0.8 and values["clipped_low"] == 0.0
    assert values["ratio_max"] == pytest.approx(torch.tensor(1.0).exp().item(), rel=1e-4)
    assert values["log_prob_gap"] == pytest.approx(1.0, rel=1e-4)
    share = values["gap_mean"]  # of tokens that are one nat apart; for them ratio - log(ratio) - 1 is e - 2
    assert values["gap_kl"] == pytest.approx(share * (torch.e - 2.0), rel=1e-3)
