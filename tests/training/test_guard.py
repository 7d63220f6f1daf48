"""Spikes: a step far from those before it changes nothing; several in a row send the run back, past their data."""

from pathlib import Path

import pytest
import torch

from liaoyuan.data import Batch
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.rundir import read_metrics
from liaoyuan.training import TrainConfig, train
from liaoyuan.training.guard import SpikeConfig, SpikeGuard
from tests.training.batches import invented_batches

QUIET = {"warmup_steps": 1, "learning_rate": 1e-4, "batch_tokens": 64}


def test_far_is_counted_in_deviations_of_the_steps_that_counted() -> None:
    guard = SpikeGuard(SpikeConfig(action="skip", fewest=4, window=4, deviations=3.0))
    for loss in (1.0, 2.0, 1.0, 2.0):
        assert guard.limits == (float("inf"), float("inf"))
        guard.note(loss, 10.0 + loss, dropped=False)
    deviation = (1 / 3) ** 0.5
    assert guard.limits == pytest.approx((1.5 + 3 * deviation, 11.5 + 3 * deviation))
    guard.note(100.0, 100.0, dropped=True)
    assert guard.limits[0] == pytest.approx(1.5 + 3 * deviation)
    again = SpikeGuard(guard.config, **guard.state())  # type: ignore[arg-type]
    assert again.limits == guard.limits


def spoiled(config: ModelConfig, bad: range):  # type: ignore[no-untyped-def]
    """Return batches of which those of the steps `bad` have weights whose loss is far off."""
    right = invented_batches(config)

    def batches(step: int) -> list[Batch]:
        found = right(0)
        if step in bad:
            odd = [Batch(b.tokens, b.positions, (b.targets * 0 + 7), b.weights, b.boundaries) for b in found]
            return [*odd]
        return found

    return batches


def run(config: ModelConfig, folder: Path, action: str, bad: range, steps: int = 14) -> tuple[Decoder, list[dict]]:
    spikes = SpikeConfig(action=action, fewest=4, deviations=6.0, in_a_row=3)  # type: ignore[arg-type]
    settings = TrainConfig(steps=steps, spikes=spikes, checkpoint_every=4, **QUIET)  # type: ignore[arg-type]
    model = initialise(Decoder(config), 0)
    train(model, spoiled(config, bad), settings, folder)
    return model, read_metrics(folder / "metrics.jsonl")


def test_a_spike_changes_nothing_and_is_logged(tiny_config: ModelConfig, tmp_path: Path) -> None:
    _, rows = run(tiny_config, tmp_path / "skip", "skip", range(8, 10))
    assert [row["step"] for row in rows if row.get("dropped")] == [8, 9]
    assert rows[10]["loss"] < rows[7]["loss"]
    _, plain = run(tiny_config, tmp_path / "none", "none", range(8, 10))
    assert not any(row.get("dropped") for row in plain)


def test_spikes_in_a_row_send_the_run_back_past_their_data(
    tiny_config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = run(tiny_config, tmp_path / "back", "roll_back", range(9, 12))
    assert [row["step"] for row in rows] == list(range(14))
    assert not any(row.get("dropped") for row in rows)
    assert "back from step 11 to 8, past 4 steps of data" in caplog.text
    whole, _ = run(tiny_config, tmp_path / "clean", "none", range(0))
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
