"""Rollouts from filtered distributions: training normalises over the very tokens that could be drawn (trl#6789)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import QUICK, prove
from liaoyuan.models import Decoder, initialise, with_dtype
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks import Right
from liaoyuan.tuning import ReinforceConfig, policy_log_probs, reinforce
from liaoyuan.tuning.packing import PackedRollouts, pack
from liaoyuan.tuning.recipe import sampling_of
from liaoyuan.tuning.rollout import Rollouts, roll_out
from liaoyuan.tuning.validation import tuning_engine
from tests.tuning.test_reinforce import CONFIG, EndSoon, rewarding_even

FILTERS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8},
    {"thought_tokens": 3},
    {"thought_tokens": 3, "top_p": 0.9},
]


def rolled(model: Decoder, tokenizer: Tokenizer, config: ReinforceConfig) -> tuple[Rollouts, PackedRollouts]:
    problems = [EndSoon().problem(0, place, 1) for place in range(4)]
    engine = tuning_engine(model, config.max_tokens)
    sampling = sampling_of(config, tokenizer)
    rollouts = roll_out(engine, tokenizer, Right(EndSoon()), problems, 4, 3, config.max_tokens, sampling)
    (part,) = pack(rollouts, torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), torch.device("cpu"))
    return rollouts, part


def config_of(settings: dict[str, Any]) -> ReinforceConfig:
    return ReinforceConfig.model_validate(CONFIG.model_dump() | {"max_tokens": 12} | settings)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_ratio_is_one_to_the_last_bit(
    small_model: Decoder, tokenizer: Tokenizer, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model, config = initialise(Decoder(with_dtype(small_model.config, dtype)), 0).eval(), config_of(settings)
    if not prove(model, QUICK).exact:
        pytest.skip("no exact kernels on this machine")
    _, part = rolled(model, tokenizer, config)
    found = policy_log_probs.policy_log_probs(model, part, config).detach()
    assert torch.equal(found, part.rollout_log_probs) and found.isfinite().all()
    raw = model(part.tokens, part.positions, part.context, targets=part.targets, rows=part.rows).detach()
    assert (raw - part.rollout_log_probs).abs().max() > 1e-2  # what training would take it for without


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_values_and_gradients_are_those_of_a_softmax_over_what_could_be_drawn(
    small_model: Decoder, tokenizer: Tokenizer, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_log_probs, "CHUNK", 7 * small_model.config.vocab_size)  # several chunks, the last short
    config = config_of(settings)
    _, part = rolled(small_model, tokenizer, config)
    weights = torch.randn(len(part.rows))

    def gradients(values: torch.Tensor) -> list[torch.Tensor]:
        small_model.zero_grad()
        (values * weights).sum().backward()
        return [parameter.grad.clone() for parameter in small_model.parameters() if parameter.grad is not None]

    found = policy_log_probs.policy_log_probs(small_model, part, config)
    ours = gradients(found)
    logits = small_model(part.tokens, part.positions, part.context, rows=part.rows) / config.temperature
    if part.allowed is not None:
        bits = (part.allowed[:, :, None] >> torch.arange(32)) & 1
        logits = logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)
    plain = logits.log_softmax(-1).gather(1, part.targets[:, None])[:, 0]
    torch.testing.assert_close(found, plain, atol=2e-6, rtol=1e-5)
    for one, other in zip(ours, gradients(plain), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_a_filtered_run_learns_with_a_ratio_of_one(
    small_model: Decoder,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    rewarding_even(monkeypatch)
    config = config_of(settings | {"steps": 30, "learning_rate": 1e-2, "max_tokens": 1})
    done = reinforce(small_model, tokenizer, EndSoon(), config, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.85
    firsts = {(row["ratio_min"], row["ratio_max"]) for row in rows if "ratio_min" in row}
    assert firsts == {(1.0, 1.0)} or not done.exact


def test_a_budget_closes_the_thought(small_model: Decoder, tokenizer: Tokenizer) -> None:
    rollouts, _ = rolled(small_model, tokenizer, config_of({"thought_tokens": 3}))
    assert tokenizer.think_ids
    for answer, completion in zip(rollouts.answers, rollouts.completions, strict=True):
        assert answer.thought_length <= 3 and tokenizer.think_ids[1] in completion.tokens[:4]
    (closes,) = {one.tokens[3] for one in rollouts.completions if tokenizer.think_ids[1] not in one.tokens[:3]}
    assert closes == tokenizer.think_ids[1]
    forced = [one.logprobs[3] for one in rollouts.completions if tokenizer.think_ids[1] not in one.tokens[:3]]
    assert set(forced) == {0.0}  # nothing else could be drawn, so nothing is learned from it


def test_a_budget_needs_the_tokens_of_a_thought(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "think_ids", None)
    with pytest.raises(LiaoyuanError, match=r"rl\.thought_tokens needs a tokenizer"):
        sampling_of(config_of({"thought_tokens": 3}), tokenizer)
