"""A user's own fine-tuning: a run folder whose result is `model`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from liaoyuan.checkpoint import load_weights, save_program
from liaoyuan.config import Config, to_toml
from liaoyuan.data import Examples, Tokenizer, tokenise_file
from liaoyuan.device import select_device
from liaoyuan.models import Decoder, read_config
from liaoyuan.ops import configure
from liaoyuan.parallel import Layout, Shape, World, lay_out, resolve
from liaoyuan.rundir import Report, silent, write_atomic, write_json
from liaoyuan.tasks.seen import Seen, read_seen, write_seen
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.finetune import finetune


class SftConfig(Config):
    """`model` to begin with, `data` to learn (examples in any known layout), how to train, on which device."""

    model: Path
    data: Path
    skip_bad: bool = False  # learn from the good records of a file that has bad ones, or too long ones
    train: TrainConfig = TrainConfig(steps=300, batch_tokens=4096, learning_rate=5e-4, weight_decay=0.01)
    layout: Layout = Layout()
    sequence_length: int = Field(512, gt=0)  # of the rows into which records are packed; no record may be longer
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen


def run_sft(config: SftConfig, folder: Path, report: Report = silent, world: World | None = None) -> dict[str, Any]:
    """Fine-tune and export `folder/model`; goes on from what is in `folder`.

    `world`: the processes that train together, each of which makes this call.

    Raises:
        LiaoyuanError: model or data are missing or wrong, or a record does not fit in a batch.
    """
    configure(config.ops)
    world = world or World(device=select_device(config.device))
    data = tokenise_file(config.data, Tokenizer.load(config.model), skip_bad=config.skip_bad, report=report)
    data = data.within(config.sequence_length, config.skip_bad)
    with torch.device("meta"):
        model = Decoder(read_config(config.model))
    rows = config.train.batch_tokens // config.sequence_length
    shape = Shape(model.config, config.sequence_length, rows, config.train.microbatches)
    layout = resolve(config.layout, world.size, shape)
    world = world.arrange(layout)
    program = lay_out(model, layout, world)
    load_weights(program, config.model)
    if world.is_first:
        write_atomic(folder / "config.toml", to_toml(config))
        write_json(folder / "data_report.json", data.to_dict())
        Seen(folder, config.model).add_records(Examples(config.data))
    done = finetune(program, data.records, config.train, folder, report, None, world, config.sequence_length)
    save_program(program, folder / "model", config.model, world)
    if world.is_first:
        write_seen(folder / "model", read_seen(folder))
    return {"records": len(data.records), "left_out": data.left_out, **asdict(done)}
