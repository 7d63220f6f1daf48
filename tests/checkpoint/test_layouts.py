"""States of real layouts: tensor, expert and pipeline parallelism to one process and back, buffers included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from liaoyuan.checkpoint.tensors import local_tensors
from liaoyuan.checkpoint.training_state import load_state, save_state
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout, Program, Shape, World, lay_out, local, resolve
from liaoyuan.training import AdamW
from tests.checkpoint.processes import together
from tests.parallel.layouts import LENGTH, MODELS, ROWS, batches_of, model_of

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fsdp x tp": ("dense", 4, {"tp": 2}),
    "hsdp": ("tied", 4, {"dp": 2}),
    "experts over fsdp x tp": ("latent", 4, {"tp": 2, "ep": 2}),
    "experts, replicated": ("experts", 4, {"dp": 2, "ep": 2}),
    "pipeline x fsdp": ("latent", 4, {"pp": 2}),
    "pipeline, both ends in one process": ("dense", 2, {"pp": 2, "schedule": "zbv"}),
}


def laid_out(world: World, kind: str, axes: dict[str, Any]) -> tuple[Program, AdamW, World]:
    config = config_from_dict(MODELS[kind])
    if world.size > 1:
        layout = resolve(Layout.model_validate(axes), world.size, Shape(config, LENGTH, ROWS, microbatches(axes)))
        world = world.arrange(layout)
        program = lay_out(model_of(kind, torch.float32), layout, world)
    else:
        program = Program([model_of(kind, torch.float32)])
    return program, AdamW(program.named_parameters(), world=world), world


def microbatches(axes: dict[str, Any]) -> int:
    return 4 if "pp" in axes else 1


def moments_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of the optimiser whose moments are those of the weights, doubled."""
    state = {}
    for name in tensors:
        if name.startswith("optimiser."):
            parameter, _, key = name.removeprefix("optimiser.").rpartition(".")
            state[f"{parameter}.{key}"] = torch.tensor(7.0) if key == "step" else 2 * tensors[f"model.{parameter}"]
    return state


def save(world: World, folder: Path, kind: str, axes: dict[str, Any]) -> None:
    program, optimiser, world = laid_out(world, kind, axes)
    optimiser.load(moments_of(local_tensors(program, optimiser)))
    batch = batches_of(program.config, microbatches(axes), world.data_rank, world.data_size)[0]
    if "schedule" not in axes:  # PyTorch's zbv cannot evaluate before it has trained
        program.eval().loss(batch)  # after which FSDP leaves some weights whole
    save_state(folder, 1, program, optimiser, {}, world)


def load(world: World, folder: Path, kind: str, axes: dict[str, Any]) -> None:
    program, optimiser, world = laid_out(world, kind, axes)
    held = {f"model.{name}": local(tensor) for name, tensor in program.named_tensors()}
    expected = {name: value.clone() for name, value in held.items()}
    for value in held.values():
        value.add_(1)
    assert load_state(folder, program, optimiser, world) == (1, {})
    moments = moments_of(expected | {f"optimiser.{name}": value for name, value in optimiser.state().items()})
    expected |= {f"optimiser.{name}": value for name, value in moments.items()}
    found = held | {f"optimiser.{name}": value for name, value in optimiser.state().items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_a_layout_is_that_of_one_process(case: str, tmp_path: Path) -> None:
    kind, size, axes = CASES[case]
    together(size, save, tmp_path / "laid-out", kind, axes)
    load(World(), tmp_path / "laid-out", kind, {})
    save(World(), tmp_path / "one", kind, {})
    together(size, load, tmp_path / "one", kind, axes)
