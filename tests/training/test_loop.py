"""The training loop: its loss, and that a killed run ends as one never interrupted."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from liaoyuan.data import Batch
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, PackedContext, initialise, with_dtype
from liaoyuan.rundir import Progress, read_metrics
from liaoyuan.training import Stopped, TrainConfig, train
from tests.training.batches import invented_batch, invented_batches

CONFIG = TrainConfig(steps=12, warmup_steps=2, checkpoint_every=4, learning_rate=0.01)


def trained(config: ModelConfig, folder: Path, settings: TrainConfig = CONFIG, microbatches: int = 1) -> Decoder:
    model = initialise(Decoder(config), 0)
    train(model, invented_batches(config, microbatches), settings, folder)
    return model


def test_the_loss_is_the_mean_over_all_microbatches_and_falls(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = initialise(Decoder(tiny_config), 0)
    total = weight = 0.0
    for batch in invented_batches(tiny_config, 3)(0):
        log_probs = model(batch.tokens, batch.positions, PackedContext(batch.boundaries), targets=batch.targets)
        total -= float((log_probs * batch.weights).sum().detach())
        weight += float(batch.weights.sum())
    result = train(model, invented_batches(tiny_config, 3), CONFIG, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert [row["step"] for row in rows] == list(range(12))
    assert result.loss == rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert result.tokens == rows[-1]["tokens"] == 12 * 3 * 48


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.01, 0.0), (0.0, 0.1), (0.01, 0.1)])
def test_z_loss_and_label_smoothing_are_learned_but_not_shown_as_loss(
    z_loss: float, label_smoothing: float, microbatches: int, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    model = initialise(Decoder(tiny_config), 0)
    sums = torch.zeros(3)  # of the cross-entropy, of what is learned, of the weights
    for batch in invented_batches(tiny_config, microbatches)(0):
        logits = model(batch.tokens, batch.positions, PackedContext(batch.boundaries))
        plain = cross_entropy(logits, batch.targets, reduction="none")
        learned = cross_entropy(logits, batch.targets, label_smoothing=label_smoothing, reduction="none")
        learned = learned + z_loss * logits.logsumexp(-1).square()
        sums = sums + torch.stack([(batch.weights * x).sum() for x in (plain, learned, torch.ones_like(plain))])
    loss, learned, _ = sums / sums[2].detach()
    gradients = torch.autograd.grad(learned, list(model.parameters()))
    norm = torch.stack([x.square().sum() for x in gradients]).sum().sqrt()
    settings = CONFIG.model_copy(update={"steps": 1, "z_loss": z_loss, "label_smoothing": label_smoothing})
    train(model, invented_batches(tiny_config, microbatches), settings, tmp_path)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert row["penalty"] == pytest.approx(float((learned - loss).detach()), rel=1e-3)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_run_without_them_shows_no_penalty(tiny_config: ModelConfig, tmp_path: Path) -> None:
    trained(tiny_config, tmp_path, CONFIG.model_copy(update={"steps": 1}))
    assert "penalty" not in read_metrics(tmp_path / "metrics.jsonl")[0]


def test_microbatches_give_the_gradient_of_one_batch(tiny_config: ModelConfig, tmp_path: Path) -> None:
    whole = invented_batch(tiny_config.vocab_size, 5)
    parts = [
        type(whole)(
            *(x[a:b] for x in (whole.tokens, whole.positions, whole.targets, whole.weights)),
            torch.tensor([0, b - a], dtype=torch.int32),
        )
        for a, b in ((0, 24), (24, 40), (40, 48))
    ]
    norms = []
    for name, batches in (("one", [whole]), ("three", parts)):
        model = initialise(Decoder(tiny_config), 0)
        train(model, lambda step, batches=batches: batches, CONFIG.model_copy(update={"steps": 1}), tmp_path / name)
        row = read_metrics(tmp_path / name / "metrics.jsonl")[0]
        norms.append((row["loss"], row["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "ways"),
    [
        (torch.float32, {"optimiser": "adamw"}),
        (torch.float32, {"optimiser": "muon"}),
        (torch.bfloat16, {"optimiser": "adamw"}),
        (torch.bfloat16, {"optimiser": "muon"}),
        (torch.bfloat16, {"optimiser": "adamw", "master_dtype": "bfloat16"}),
    ],
)
def test_a_run_that_broke_off_ends_bit_for_bit_as_one_that_did_not(
    dtype: torch.dtype, ways: dict[str, str], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    config = with_dtype(tiny_config, dtype)
    settings = CONFIG.model_copy(update=ways)
    expected = trained(config, tmp_path / "whole", settings, microbatches=2)
    good = invented_batches(config, 2)

    def breaking(step: int) -> list[Batch]:
        if step == 10:
            raise KeyError("the power went")
        return good(step)

    with pytest.raises(KeyError):
        train(initialise(Decoder(config), 0), breaking, settings, tmp_path / "broken")
    resumed = trained(config, tmp_path / "broken", settings, microbatches=2)
    assert_same(expected, resumed)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
    for key in ("step", "loss", "grad_norm", "learning_rate", "tokens", "flops"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]


class Run:
    """A training run in a process of its own, which tells the number of every step before it takes it."""

    def __init__(self, config: ModelConfig, settings: TrainConfig, folder: Path) -> None:
        context = multiprocessing.get_context("fork")  # torch is loaded already, and has one thread
        self.told, end = context.Pipe(duplex=False)
        self.process = context.Process(target=self._run, args=(config, settings, folder, end))
        self.process.start()
        end.close()

    def _run(self, config: ModelConfig, settings: TrainConfig, folder: Path, end: Connection) -> None:
        invented = invented_batches(config)

        def batches(step: int) -> list[Batch]:
            end.send(step)
            return invented(step)

        try:
            train(initialise(Decoder(config), 0), batches, settings, folder)
        except LiaoyuanError as error:
            end.send(str(error))
            sys.exit(error.exit_code)

    def wait_for_step(self, step: int) -> None:
        while self.told.recv() != step:
            pass

    def last_words(self) -> str:
        """Return the error that ended the run."""
        while True:
            word = self.told.recv()
            if isinstance(word, str):
                self.process.join()
                return word


@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16"])
def test_kill_9_at_any_step_then_the_same_command_ends_with_the_same_weights(
    master_dtype: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    config = with_dtype(tiny_config, getattr(torch, master_dtype))
    settings = CONFIG.model_copy(update={"master_dtype": master_dtype})
    expected = trained(config, tmp_path / "whole", settings)
    for step in (1, 6):  # before the first state, and between two
        run = Run(config, settings, tmp_path / "killed")
        run.wait_for_step(step)
        run.process.kill()
        run.process.join()
        assert run.process.exitcode == -signal.SIGKILL
    assert_same(expected, trained(config, tmp_path / "killed", settings))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_step_saves_and_says_so(
    number: signal.Signals, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    settings = CONFIG.model_copy(update={"steps": 100_000, "checkpoint_every": 100_000, "learning_rate": 1e-5})
    run = Run(tiny_config, settings, tmp_path)
    run.wait_for_step(5)
    assert run.process.pid
    os.kill(run.process.pid, number)
    words = run.last_words()
    assert run.process.exitcode == Stopped.exit_code
    saved = sorted((tmp_path / "state").glob("step-*"))[-1]
    step = int(saved.name.removeprefix("step-"))
    assert step >= 5
    assert words == f"Stopped after step {step} of 100000; the same command goes on from there."
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == step - 1


def test_a_finished_run_is_not_trained_again(tiny_config: ModelConfig, tmp_path: Path) -> None:
    expected = trained(tiny_config, tmp_path)
    model = initialise(Decoder(tiny_config), 0)
    result = train(model, invented_batches(tiny_config), CONFIG, tmp_path, report=lambda _: pytest.fail("it trains"))
    assert result.steps == CONFIG.steps
    assert_same(expected, model)


def test_another_setting_is_refused_by_name(tiny_config: ModelConfig, tmp_path: Path) -> None:
    trained(tiny_config, tmp_path)
    with pytest.raises(LiaoyuanError, match=r"learning_rate = 0\.01, not 0\.02"):
        trained(tiny_config, tmp_path, CONFIG.model_copy(update={"learning_rate": 0.02}))


def test_a_loss_that_stays_not_finite_is_one_sentence(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = initialise(Decoder(tiny_config), 0)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(LiaoyuanError, match="not finite in 5 steps in a row"):
        train(model, invented_batches(tiny_config), CONFIG, tmp_path)


def test_one_bad_batch_is_passed_over(tiny_config: ModelConfig, tmp_path: Path) -> None:
    good = invented_batches(tiny_config)

    def batches(step: int) -> list[Batch]:
        if step == 3:
            bad = good(step)
            bad[0].weights.fill_(float("inf"))
            return bad
        return good(step)

    model = initialise(Decoder(tiny_config), 0)
    train(model, batches, CONFIG, tmp_path)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] < 4.3


def test_evaluation_when_due_is_in_the_metrics(tiny_config: ModelConfig, tmp_path: Path) -> None:
    told: list[Progress] = []
    settings = CONFIG.model_copy(update={"evaluate_every": 5})
    model = initialise(Decoder(tiny_config), 0)
    evaluate = lambda model: {"held_out_loss": float(model.training)}  # noqa: E731
    train(model, invented_batches(tiny_config), settings, tmp_path, told.append, evaluate)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4, 9, 11]
    assert all(row.get("held_out_loss", 0.0) == 0.0 for row in rows)  # called on a model in evaluation mode
    assert told[-1].done == told[-1].total == 12 and model.training


def assert_same(one: Decoder, two: Decoder) -> None:
    for (name, mine), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other), name
