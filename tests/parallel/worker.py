"""What each process of a test of FSDP does."""

import os
from pathlib import Path

from liaoyuan.checkpoint import save_model
from liaoyuan.data import Batch
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.parallel import Layout, World, lay_out
from liaoyuan.training import TrainConfig, train
from tests.training.batches import invented_batches


def main(folder: Path, settings: TrainConfig, config: ModelConfig, world: World, die_at: int | None = None) -> None:
    """Train on this process's half of every global batch of two microbatches; export the whole model."""
    whole = invented_batches(config, microbatches=2)

    def batches(step: int) -> list[Batch]:
        if step == die_at and world.rank == world.size - 1:
            os._exit(9)
        return whole(step)[world.rank :: world.size]

    layout = Layout(fsdp=world.size)
    world = world.arrange(layout)
    program = lay_out(initialise(Decoder(config), 0), layout, world)
    train(program, batches, settings, folder, world=world)
    weights = dict(program.whole_tensors())
    if world.is_first:
        save_model(config, folder / "model", state=weights)
    world.barrier()
