"""What each process of a test under torchrun runs: `worker.py FOLDER STEPS CONFIG`."""

import json
import os
import sys
from pathlib import Path

import torch

from liaoyuan.checkpoint import save_model
from liaoyuan.data import Batch
from liaoyuan.device import Device
from liaoyuan.models import Decoder, ModelConfig, config_from_dict, initialise
from liaoyuan.parallel import Layout, World, lay_out, start
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    together = start(Device("cpu"))
    main(
        Path(task["folder"]),
        TrainConfig(**task["settings"]),
        config_from_dict(task["config"]),
        together,
        task.get("die_at"),
    )
    together.close()
