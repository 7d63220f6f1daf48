"""Preferences learned by adapters alone: the reference is the base with them off, and the result is an adapter."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model
from liaoyuan.cli.main import app
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models.lora import adapters_of, kept_adapters, without_adapters
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks.rewards.judged import log_odds_of
from liaoyuan.tuning.card import read_card
from liaoyuan.tuning.lora import LoraConfig, Method
from liaoyuan.tuning.preference import run_preference
from liaoyuan.tuning.preference_batches import AnswerBatches, judge
from liaoyuan.tuning.reference import ReferredBatches, answer_log_probs
from liaoyuan.tuning.start import Start
from tests.tuning.test_preference import LENGTH, config, data, interrupted, pairs, verb

__all__ = ["data"]  # a fixture


def learned(start: Start) -> Program:
    """Return what `start` says, as if its adapters had learned something."""
    program, generator = Program([start.load()]), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, weight in program.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * 0.1)
    return program


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("base", ["whole", "int8"])
def test_the_reference_is_the_base_to_the_last_bit_whatever_was_learned(
    method: Method, base: Any, model_folder: Path, tokenizer: Tokenizer
) -> None:
    start = Start(model_folder, method, LoraConfig(rank=4, base=base))
    program, plain = learned(start), Program([start.base()])
    items = judge(tokenizer, pairs(9), paired=True)
    answers = [answer for item in items for answer in item.answers]
    expected = answer_log_probs(plain, answers, LENGTH, World())
    assert (answer_log_probs(program, answers, LENGTH, World()) - expected).abs().max() > 0.1
    with without_adapters(program.models):
        assert torch.equal(answer_log_probs(program, answers, LENGTH, World()), expected)
    others = ([answers[place] for place in range(0, len(answers), 2)], torch.zeros(len(items)))
    batches = AnswerBatches(items, torch.zeros(len(answers)), 0, 4 * LENGTH, 4 * LENGTH, others=others)
    found, given = (ReferredBatches(batches, one)(1) for one in (program, plain))
    assert all(
        one.reference.equal(other.reference) and one.reference.all() for one, other in zip(found, given, strict=True)
    )
    assert found[0].strangers_reference == given[0].strangers_reference < 0


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_is_computed_once_has_the_same_bits(method: Method, model_folder: Path, tokenizer: Tokenizer) -> None:
    program = learned(Start(model_folder, method, LoraConfig(rank=4)))
    answers = [answer for item in judge(tokenizer, pairs(4), paired=True) for answer in item.answers]
    expected = answer_log_probs(program, answers, LENGTH, World())
    with kept_adapters(program.models[0]):
        assert torch.equal(answer_log_probs(program, answers, LENGTH, World()), expected)
    with torch.no_grad():
        next(iter(adapters_of(program.models[0]))).lora_B[0].add_(1.0)
    assert not torch.equal(answer_log_probs(program, answers, LENGTH, World()), expected)


def test_an_adapter_learns_what_was_chosen_from_a_margin_of_exactly_nothing(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    before = (model_folder / "model.safetensors").read_bytes()
    for loss, first_loss in (("dpo", math.log(2)), ("kto", 0.5)):
        out = tmp_path / loss
        done = run_preference(config(model_folder, data, loss, method="lora"), out)
        rows = read_metrics(out / "metrics.jsonl")
        assert rows[0]["margin"] == rows[0]["kl"] == 0.0
        assert rows[0]["loss"] == pytest.approx(first_loss, abs=1e-6) and rows[-1]["loss"] < rows[0]["loss"]
        assert done["comparison"]["model - start"]["margin"]["low"] > 0, "on problems that it did not learn from"
    assert (model_folder / "model.safetensors").read_bytes() == before and not (out / "model").exists()
    card = read_card(out / "adapter")
    assert (card["relation"], card["method"]) == ("adapter", "preference tuning (kto, lora)")
    assert "model - start" in card["controls"] and card["data"][0]["source"] == "pairs of sums"


@pytest.mark.parametrize("base", ["whole", "int8"])
def test_the_adapter_is_merged_as_what_was_trained(base: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    """The gate takes the run's own held-out answers; a merged reward model is one too."""
    out = tmp_path / "out"
    given = verb("reward", "--model", model_folder, "--data", data, "--out", out, "--lora")
    shown = CliRunner().invoke(app, ["tune", *given, "--set", f"lora.base={base}"], catch_exceptions=False)
    assert f"liaoyuan convert --merge {out / 'adapter'}" in shown.stdout
    merging = ["convert", "--merge", str(out / "adapter"), "--model", str(model_folder), "--out", str(tmp_path / "m")]
    figures = json.loads(CliRunner().invoke(app, [*merging, "--json"], catch_exceptions=False).stdout)
    assert figures["tolerated"] and figures["records"] > 5
    mark = json.loads((tmp_path / "m" / "liaoyuan_reward.json").read_text())["mark"]
    items = judge(Tokenizer.load(tmp_path / "m"), pairs(60)[40:], True)
    conversations = [one.tokens for item in items for one in item.answers]
    trained = Start(model_folder, "lora", LoraConfig(base=base)).trained(out / "adapter")  # type: ignore[arg-type]
    rewards = [torch.tensor(log_odds_of(one, mark, conversations)) for one in (trained, load_model(tmp_path / "m"))]
    torch.testing.assert_close(*rewards, atol=1e-4 if base == "whole" else 0.2, rtol=1e-4)


def test_a_run_stopped_and_killed_ends_bit_for_bit_as_one_never_interrupted(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=4, dropout=0.3)
    given, out = config(model_folder, data, "kto", method="dora", lora=lora), tmp_path / "out"
    whole = run_preference(given, tmp_path / "whole")
    assert "Stopped after step 4 of 8" in interrupted(given, out, 3, signal.SIGINT)[1]
    assert interrupted(given, out, 7, signal.SIGKILL)[0] == -signal.SIGKILL
    assert run_preference(given, out)["comparison"] == whole["comparison"]
    files = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "whole", out)]
    assert files[0] == files[1]
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "whole", out)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_rates_follow_the_method_and_what_adapters_cannot_do_is_refused(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    given = ["tune", "dpo", "--model", str(model_folder), "--data", str(data), "--set", "train.steps=1"]
    given += [part for one in ("train.batch_tokens=384", "sequence_length=96", "device=cpu") for part in ("--set", one)]
    for name, extra, rate in (("full", [], 1e-5), ("lora", ["--lora"], 1e-4)):
        CliRunner().invoke(app, [*given, "--out", str(tmp_path / name), *extra], catch_exceptions=False)
        assert f"learning_rate = {rate}" in (tmp_path / name / "config.toml").read_text()
        assert "weight_decay = 0.0" in (tmp_path / name / "config.toml").read_text()
    for setting, said in (
        ("train.optimiser=muon", "whole matrices"),
        ("train.master_dtype=bfloat16", "whole weights"),
        ("lora.targets=['q_prj']", "did you mean 'q_proj'"),
    ):
        with pytest.raises(LiaoyuanError, match=said):
            command = [*given, "--lora", "--out", str(tmp_path / "refused"), "--set", setting]
            CliRunner().invoke(app, command, catch_exceptions=False)
