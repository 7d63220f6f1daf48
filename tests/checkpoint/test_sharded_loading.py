"""A sharded model is filled without any process holding it whole: from a folder, or by the draws of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import load_model, load_weights, save_model
from liaoyuan.checkpoint.hugging_face import named_tensors
from liaoyuan.models import Decoder, ModelConfig, config_from_dict, initialise
from liaoyuan.parallel import Layout, Program, Shape, World, lay_out, resolve
from tests.parallel.layouts import MODELS, model_of
from tests.parallel.processes import run

LAYOUTS = {
    "fsdp 2": (2, Layout()),
    "fsdp 2 x tp 2": (4, Layout(tp=2)),
    "ep 2 of fsdp 2 x tp 2": (4, Layout(tp=2, ep=2)),
    "pp 2 x fsdp 2": (4, Layout(pp=2)),
}


def empty(world: World, config: ModelConfig, layout: Layout) -> Program:
    """Return the model laid out, with memory for this process's part and nothing in it."""
    layout = resolve(layout, world.size, Shape(config, 48, 8, 2))
    with torch.device("meta"):
        model = Decoder(config)
    program = lay_out(model, layout, world.arrange(layout))
    with torch.no_grad():
        for _, tensor in program.named_tensors():
            tensor.fill_(float("nan"))
    return program


def loaded(world: World, folder: Path, config: ModelConfig, layout: Layout) -> dict[str, torch.Tensor]:
    program = empty(world, config, layout)
    load_weights(program, folder)
    return dict(program.whole_tensors())


def drawn(world: World, config: ModelConfig, layout: Layout) -> dict[str, torch.Tensor]:
    return dict(empty(world, config, layout).initialise(7).whole_tensors())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["dense", "latent"])
def test_every_layout_reads_the_weights_of_a_whole_load(kind: str, name: str, tmp_path: Path) -> None:
    size, layout = LAYOUTS[name]
    if layout.ep > 1 and kind == "dense":
        pytest.skip("no experts")
    model = model_of(kind, torch.bfloat16 if kind == "dense" else torch.float32)
    config = replace(model.config, dtype="bfloat16" if kind == "dense" else "float32")
    save_model(config, tmp_path / "model", state=model.state_dict(), max_shard_bytes=50_000)
    whole = dict(named_tensors(load_model(tmp_path / "model")))
    for mine in run(size, loaded, tmp_path / "model", config, layout):
        assert mine.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", ["fsdp 2", "fsdp 2 x tp 2", "pp 2 x fsdp 2"])
def test_every_layout_draws_the_weights_of_one_process(name: str) -> None:
    size, layout = LAYOUTS[name]
    config = config_from_dict(MODELS["latent"])
    expected = initialise(Decoder(config), 7).state_dict()
    for mine in run(size, drawn, config, layout):
        for key, value in expected.items():
            assert torch.equal(mine[key], value), key
