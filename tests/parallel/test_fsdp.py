"""Two gloo processes with FSDP against one process: same losses, same exported model, resumed bit for bit."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.checkpoint.staging import LOCK
from liaoyuan.device import Device
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import World, start
from liaoyuan.rundir import Lock, read_metrics
from liaoyuan.training import TrainConfig
from tests.parallel import worker
from tests.parallel.processes import free_port

SETTINGS = TrainConfig(steps=6, warmup_steps=2, checkpoint_every=2, learning_rate=0.01)


def fork_two(folder: Path, config: ModelConfig, settings: TrainConfig, die_at: int | None = None) -> list[int | None]:
    """Train in two forks of this process, which have torch loaded already; return their exit codes."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    arguments = (folder, config, settings, port, die_at)
    processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    return [process.exitcode for process in processes]


def run_rank(
    rank: int, folder: Path, config: ModelConfig, settings: TrainConfig, port: int, die_at: int | None
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = start(Device("cpu"))
    worker.main(folder, settings, config, world, die_at)
    world.close()


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("tied", "optimiser"), [(True, "adamw"), (False, "muon")])
def test_two_processes_give_the_losses_and_the_model_of_one(
    tied: bool, optimiser: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, tie_word_embeddings=tied)
    settings = SETTINGS.model_copy(update={"optimiser": optimiser})
    worker.main(tmp_path / "one", settings, config, World())
    assert fork_two(tmp_path / "two", config, settings) == [0, 0]
    # Muon orthogonalises in bf16, so that it magnifies the last bit of a sum that is taken in another order.
    tolerance = 1e-6 if optimiser == "adamw" else 1e-3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=tolerance)
    one, two = (load_model(tmp_path / name / "model") for name in ("one", "two"))
    for (name, mine), other in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 if optimiser == "adamw" else 0.05, msg=name)


def test_a_run_whose_process_died_goes_on_bit_for_bit(tiny_config: ModelConfig, tmp_path: Path) -> None:
    assert fork_two(tmp_path / "whole", tiny_config, SETTINGS) == [0, 0]
    assert 0 not in fork_two(tmp_path / "broken", tiny_config, SETTINGS, die_at=3)
    Lock(tmp_path / "broken" / "state", LOCK, patience=60).pass_through()  # what was being saved is finished
    assert sorted(path.name for path in (tmp_path / "broken" / "state").glob("step-*")) == ["step-000002"]
    assert fork_two(tmp_path / "broken", tiny_config, SETTINGS) == [0, 0]
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    whole, broken = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()


def test_a_world_of_one_needs_no_process_group() -> None:
    world = start(Device("cpu"))
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.sum_numbers(1.5, 2.0) == [1.5, 2.0]
    assert world.broadcast("燎原") == "燎原"
    assert torch.equal(world.sum(torch.ones(2)), torch.ones(2))
    world.barrier()
    world.close()
