"""Adapters in reinforcement learning: exact rollouts, the base for a reference, workers, resuming, and what is left."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from liaoyuan.checkpoint import save_model
from liaoyuan.cli.main import app
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import QUICK, prove
from liaoyuan.models import Decoder, initialise
from liaoyuan.models.lora import without_adapters
from liaoyuan.rundir import read_metrics
from liaoyuan.tasks import Right
from liaoyuan.tuning import reinforce
from liaoyuan.tuning.card import read_card
from liaoyuan.tuning.curriculum import fresh_shares
from liaoyuan.tuning.lora import LoraConfig, Method
from liaoyuan.tuning.measures import kl_to
from liaoyuan.tuning.rollout_workers import WorkerRollouts
from liaoyuan.tuning.sources import LocalRollouts
from liaoyuan.tuning.start import Start
from tests.tuning.conftest import small_config
from tests.tuning.test_reinforce import CONFIG, EndSoon, rewarding_even, weights
from tests.tuning.test_rl_rollouts import contents
from tests.tuning.test_rollout_workers import Coin, config_of

RATE = {"learning_rate": 2e-2}


@pytest.fixture
def base(tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A model folder that adapters can turn: its logits are not all alike."""
    shape = replace(small_config(tokenizer), initializer_range=0.3)
    save_model(initialise(Decoder(shape), seed=0), tmp_path / "base", tokenizer_folder)
    return tmp_path / "base"


def start_of(folder: Path, method: Method = "lora", base: Any = "whole") -> Start:
    return Start(folder, method, LoraConfig(rank=4, base=base))


@pytest.mark.parametrize(("method", "bits"), [("lora", "whole"), ("dora", "whole"), ("rslora", "int8")])
def test_rollouts_of_adapters_are_what_training_computes_and_it_learns(
    method: Method, bits: str, base: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    start, before = start_of(base, method, bits), (base / "model.safetensors").read_bytes()
    model = start.load()
    config = CONFIG.model_copy(update={"steps": 12, "max_tokens": 2, **RATE})
    reinforce(model, tokenizer, EndSoon(), config, tmp_path, start=start)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.8 > rows[0]["reward"]
    learned = [row for row in rows if row["updates"]]
    if prove(model, QUICK).exact:  # of adapters that have learned, too
        assert all(row["exact"] and not row["corrected"] and row["log_prob_gap"] == 0.0 for row in learned)
        assert all(row["ratio_min"] == row["ratio_max"] == 1.0 for row in learned)
    assert rows[0]["kl_start"] == pytest.approx(0.0, abs=1e-9) and rows[-1]["kl_start"] > 0.01
    assert (base / "model.safetensors").read_bytes() == before
    state = max((tmp_path / "state").glob("step-*"))
    held = sum(file.stat().st_size for file in state.glob("*.safetensors"))
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert held < 3 * trained + 40_000, "the state has the adapters and two moments, nothing of the base"


def test_the_divergence_is_taken_to_the_base(
    small_model: Decoder, model_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """To the model with its adapters off, bit for bit as to a copy of what was begun with."""
    model = start_of(model_folder).load()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.05 if "lora_B" in name else 0.0)
    drawn = LocalRollouts(model, tokenizer, EndSoon(), Right(EndSoon()), CONFIG).draw(0, fresh_shares(CONFIG.levels))
    with without_adapters([model]):
        found = kl_to(model, drawn.rollouts, CONFIG)
    assert found == kl_to(small_model, drawn.rollouts, CONFIG) > 0.0


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_never_interrupted(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarding_even(monkeypatch)
    start, config, models = start_of(model_folder, "dora"), CONFIG.model_copy(update=RATE), {}
    for name, stops in (("whole", (6,)), ("cut", (3, 6))):
        for until in stops:  # each time in a model of its own
            models[name] = start.load()
            reinforce(models[name], tokenizer, EndSoon(), config, tmp_path / name, until=until, start=start)
    assert torch.equal(weights(models["whole"]), weights(models["cut"]))
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_workers_are_sent_adapters_alone_and_roll_out_what_this_process_would(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The base comes from its folder, int8 here; a run that goes on has what was under way, in adapters too."""
    start = start_of(model_folder, "lora", "int8")
    model = start.load()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.05 if "lora_B" in name else 0.0)
    config = config_of(1).model_copy(update={"further_draws": 0})
    shares, about = fresh_shares(config.levels), (model, tokenizer, EndSoon(), Coin(), config)
    source = WorkerRollouts(*about, tmp_path, start)
    try:
        drawn = source.draw(0, shares).rollouts
        source.save(tmp_path, 1)
    finally:
        source.close()
    here = LocalRollouts(*about).draw(0, shares).rollouts
    assert [one.logprobs for one in drawn.completions] == [one.logprobs for one in here.completions]
    assert [one.tokens for one in drawn.completions] == [one.tokens for one in here.completions]
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    with safe_open(tmp_path / "behind-000001.safetensors", "pt") as file:
        assert len(file.get_tensor("weights")) == trained and file.metadata()["version"] == "0"


def test_the_verb_leaves_an_adapter_that_is_merged_as_what_was_trained(model_folder: Path, tmp_path: Path) -> None:
    sizes = ["rl.levels=[1]", "rl.steps=2", "rl.problems=2", "rl.group=2", "rl.max_tokens=8", "lora.rank=4"]
    sizes += ["validation_problems=6", "test_problems=6", "device=cpu", "rl.minimum_groups=1"]
    out, settings = tmp_path / "out", [part for size in sizes for part in ("--set", size)]
    given = ["tune", "rl", "--model", str(model_folder), "--task", "addition", "--lora", "--out", str(out), *settings]
    shown = CliRunner().invoke(app, given, catch_exceptions=False).stdout
    assert f"liaoyuan convert --merge {out / 'adapter'} --model {model_folder}" in shown and "difference" in shown
    assert "learning_rate = 0.004" in (out / "config.toml").read_text() and not (out / "model").exists()
    card = read_card(out / "adapter")
    assert card["relation"] == "adapter" and card["method"] == "reinforcement learning on addition (grpo, lora)"
    assert card["data"] == [{"source": "generated", "licence": "unknown", "records": 6, "use": "asked"}]
    assert {"validation", "test"} <= card["controls"]["the model that was begun with"].keys()
    merging = ["convert", "--merge", str(out / "adapter"), "--model", str(model_folder), "--out", str(tmp_path / "m")]
    figures = json.loads(CliRunner().invoke(app, [*merging, "--json"], catch_exceptions=False).stdout)
    assert figures["tolerated"] and figures["records"] == 6
    assert (tmp_path / "m" / "trained_on.bin").exists()
    for setting, said in (
        ("rl.optimiser=muon", "rl.optimiser = 'muon' is for whole matrices"),
        ("lora.dropout=0.1", "lora.dropout is not for RL"),
        ("lora.targets=['q_prj']", "did you mean 'q_proj'"),
    ):
        with pytest.raises(LiaoyuanError, match=said):
            command = [*given, "--out", str(tmp_path / "refused"), "--set", setting]
            CliRunner().invoke(app, command, catch_exceptions=False)
