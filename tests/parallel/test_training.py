"""Whole runs in a layout: losses, gradient norms, expert load and the exported model are those of one process."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liaoyuan.data import Batch
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout, Shape, World, lay_out, own_block, resolve
from liaoyuan.parallel.simulated import simulate
from liaoyuan.rundir import read_metrics
from liaoyuan.training import AdamW, TrainConfig, train
from tests.conftest import slow_if
from tests.parallel.layouts import LENGTH, MODELS, ROWS, batches_of, model_of, rows_of
from tests.parallel.processes import run

SETTINGS = TrainConfig(
    steps=4, batch_tokens=ROWS * LENGTH, learning_rate=2e-3, warmup_steps=1, clip=0.5, checkpoint_every=2
)
RUNS = {
    "fsdp 2 x tp 2": (4, Layout(tp=2), 1),
    "hsdp 2 x 2": (4, Layout(dp=2), 1),
    "ring 2 x ulysses 2": (4, Layout.model_validate({"cp": {"ring": 2, "ulysses": 2}}), 2),
    "pp 2 x tp 2": (4, Layout(pp=2, tp=2), 4),
    "zbv 2 x fsdp 2": (4, Layout(pp=2, schedule="zbv"), 4),
    "ep 2 x pp 2 x fsdp 2": (4, Layout(pp=2, ep=2), 4),
    "ep 4": (4, Layout(ep=4), 1),
    "tied, pp 2 x fsdp 2": (4, Layout(pp=2), 4),
    "tied, zbv 2": (2, Layout(pp=2, schedule="zbv"), 4),
}


def training(
    world: World,
    kind: str,
    settings: TrainConfig,
    layout: Layout,
    folder: Path,
    before: Callable[[int], None] = lambda step: None,
) -> dict[str, torch.Tensor]:
    """Train and return the whole model; `before` is called before each step."""
    config = config_from_dict(MODELS[kind])
    rows = settings.batch_tokens // LENGTH
    layout = resolve(layout, world.size, Shape(config, LENGTH, rows, settings.microbatches))
    world = world.arrange(layout)
    program = lay_out(model_of(kind, torch.float32), layout, world)
    batches = batches_of(config, settings.microbatches, world.data_rank, world.data_size, rows)

    def batches_of_step(step: int) -> list[Batch]:
        before(step)
        return batches

    train(program, batches_of_step, settings, folder, world=world)
    return {name: tensor.clone() for name, tensor in program.whole_tensors()}


ADAMW = (
    "fsdp 2 x tp 2",
    "hsdp 2 x 2",
    "ep 2 x pp 2 x fsdp 2",
    "tied, zbv 2",
)  # others are slow: their axes are in these or below
MUON = ("fsdp 2 x tp 2", "ep 2 x pp 2 x fsdp 2")


@pytest.mark.parametrize(
    ("optimiser", "name"),
    [
        *(slow_if(name not in ADAMW, "adamw", name) for name in RUNS),
        *(slow_if(name not in MUON, "muon", name) for name in RUNS),
    ],
)
def test_a_run_is_that_of_one_process(optimiser: str, name: str, tmp_path: Path) -> None:
    size, layout, microbatches = RUNS[name]
    kind = "latent" if layout.ep > 1 else "tied" if name.startswith("tied") else "dense"
    tokens = rows_of(layout, microbatches, size) * LENGTH
    settings = SETTINGS.model_copy(update={"optimiser": optimiser, "balance_rate": 0.01, "batch_tokens": tokens})
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


class Stopped(Exception):  # noqa: N818  (not an error: it was asked for)
    """Ends a run between two checkpoints."""


def training_until(
    world: World, kind: str, settings: TrainConfig, layout: Layout, folder: Path, first: int, last: int
) -> dict[str, torch.Tensor]:
    """Train, or go on from step `first`, and stop before step `last`, or return the whole model at the end."""

    def stop(step: int) -> None:
        assert step >= first
        if step == last:
            raise Stopped

    try:
        return training(world, kind, settings, layout, folder, before=stop)
    except Stopped:
        return {}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        slow_if(True, "tied", (2, Layout(pp=2)), (4, Layout(tp=2)), name="tied: pp 2 to fsdp 2 x tp 2"),
        slow_if(True, "tied", (2, Layout(fsdp=2)), (2, Layout(pp=2, schedule="zbv")), name="tied: fsdp 2 to zbv 2"),
        slow_if(False, "latent", (4, Layout(pp=2, ep=2)), (2, Layout(tp=2)), name="latent: ep 2 x pp 2 to tp 2"),
    ],
)
def test_a_run_goes_on_under_another_layout(
    kind: str, before: tuple[int, Layout], after: tuple[int, Layout], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"microbatches": 4})
    expected = training(World(), kind, settings, Layout(), tmp_path / "one")
    size, layout = before
    run(size, training_until, kind, settings, layout, tmp_path / "many", 0, 3)
    size, layout = after
    for whole in run(size, training_until, kind, settings, layout, tmp_path / "many", 2, -1):
        assert whole.keys() == expected.keys()
        for tensor in whole:
            assert (whole[tensor] - expected[tensor]).abs().max() < 2e-4, tensor
    steps = [row["step"] for row in read_metrics(tmp_path / "many" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]


HELD = {
    "fsdp 3": (3, "dense", Layout(), 1),
    "fsdp 2 x tp 2": (4, "dense", Layout(tp=2), 1),
    "pp 2, tied": (2, "tied", Layout(pp=2, fsdp=1), 4),
    "ep 2 x fsdp 2": (4, "latent", Layout(ep=2), 1),
}


def updated(world: World, kind: str, layout: Layout, microbatches: int) -> dict[str, torch.Tensor]:
    """Return the whole weights after two updates of bf16 weights without masters, by gradients that are given."""
    layout = resolve(layout, world.size, Shape(config_from_dict(MODELS[kind]), LENGTH, 12, microbatches))
    world = world.arrange(layout)
    program = lay_out(model_of(kind, torch.bfloat16), layout, world)
    optimiser = AdamW(program.named_parameters(), world=world, master_dtype=torch.bfloat16)
    for step in range(2):
        for weight in optimiser.weights:
            generator = torch.Generator().manual_seed(zlib.crc32(weight.name.encode()) + step)
            slope = torch.randn(weight.parameter.shape, generator=generator)
            starts, shape = own_block(weight.parameter)
            cut = tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))
            weight.master.grad = slope[cut].contiguous()
        optimiser.update(1e-3)
        for weight in optimiser.weights:
            weight.master.grad = None
    return {name: tensor.clone() for name, tensor in program.whole_tensors()}


@pytest.mark.parametrize("name", HELD)
def test_weights_held_in_bf16_are_rounded_alike_in_every_layout(name: str) -> None:
    size, kind, layout, microbatches = HELD[name]
    expected = updated(World(), kind, Layout(), 1)
    for found in simulate(size, updated, kind, layout, microbatches):
        assert found.keys() == expected.keys()
        assert not [tensor for tensor in expected if not torch.equal(found[tensor], expected[tensor])]
