"""Whole runs in a layout: losses, gradient norms, expert load and the exported model are those of one process."""

from pathlib import Path

import pytest
import torch

from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout, Shape, World, lay_out, resolve
from liaoyuan.rundir import read_metrics
from liaoyuan.training import TrainConfig, train
from tests.parallel.layouts import LENGTH, MODELS, ROWS, batches_of, model_of
from tests.parallel.processes import run

SETTINGS = TrainConfig(
    steps=4, batch_tokens=ROWS * LENGTH, learning_rate=2e-3, warmup_steps=1, clip=0.5, checkpoint_every=2
)
RUNS = {
    "fsdp 2 x tp 2": (4, Layout(tp=2), 1),
    "hsdp 2 x 2": (4, Layout(dp=2), 1),
    "ring 2 x ulysses 2": (4, Layout.model_validate({"cp": {"ring": 2, "ulysses": 2}}), 8),
    "pp 2 x tp 2": (4, Layout(pp=2, tp=2), 4),
    "zbv 2 x fsdp 2": (4, Layout(pp=2, schedule="zbv"), 4),
    "ep 2 x pp 2 x fsdp 2": (4, Layout(pp=2, ep=2), 4),
    "ep 4": (4, Layout(ep=4), 1),
}


def training(world: World, kind: str, settings: TrainConfig, layout: Layout, folder: Path) -> dict[str, torch.Tensor]:
    """Train and return the whole model."""
    config = config_from_dict(MODELS[kind])
    layout = resolve(layout, world.size, Shape(config, LENGTH, ROWS, settings.microbatches))
    world = world.arrange(layout)
    program = lay_out(model_of(kind, torch.float32), layout, world)
    batches = batches_of(config, settings.microbatches, world.data_rank, world.data_size)
    train(program, lambda step: batches, settings, folder, world=world)
    return {name: tensor.clone() for name, tensor in program.whole_tensors()}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_run_is_that_of_one_process(name: str, optimiser: str, tmp_path: Path) -> None:
    size, layout, microbatches = RUNS[name]
    kind = "latent" if layout.ep > 1 else "dense"
    settings = SETTINGS.model_copy(update={"optimiser": optimiser, "balance_rate": 0.01})
    expected = training(World(), kind, settings, Layout(), tmp_path / "one")
    several = settings.model_copy(update={"microbatches": microbatches})
    found = run(size, training, kind, several, layout, tmp_path / "many")
    tight = optimiser == "adamw"  # Muon's iteration in bf16 magnifies the last bit of a sum taken in another order
    rows = [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("one", "many")]
    for one, many in zip(*rows, strict=True):
        for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("expert_load_max", 1e-2)):
            assert many.get(key, 0) == pytest.approx(one.get(key, 0), rel=tolerance if tight else 30 * tolerance), key
    for whole in found:
        assert whole.keys() == expected.keys()
        for tensor, reference in whole.items():
            difference = (whole[tensor] - expected[tensor]).abs().max()
            assert difference < (2e-4 if tight else 2e-2), (tensor, float(difference), reference)
