"""The fast tier of each process's own: taken if it is newer and whole for every process, else the durable one is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from liaoyuan.checkpoint.training_state import CheckpointConfig, Checkpointer
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import World
from tests.checkpoint.layouts import spread
from tests.checkpoint.processes import together


def config_of(folder: Path, asynchronous: bool = True) -> CheckpointConfig:
    return CheckpointConfig(local=folder / "local", local_every=1, asynchronous=asynchronous)


def save_and_die(world: World, folder: Path, config: ModelConfig, asynchronous: bool, layout: str) -> None:
    """Save step 2 to both tiers and step 3 to the fast one; a run that ends well would clear it."""
    states = Checkpointer(folder / "state", world, config_of(folder, asynchronous))
    made = spread(layout, config, world)
    made.fill()
    for step in (1, 2, 3):
        states.after_step(step, made.model, made.optimiser, {"tokens": step}, durable=step == 2)
        states.wait()


def load(world: World, folder: Path, config: ModelConfig, expected: int, layout: str) -> None:
    made = spread(layout, config, world)
    states = Checkpointer(folder / "state", world, config_of(folder))
    assert states.load(made.model, made.optimiser) == (expected, {"tokens": expected})
    made.assert_filled()


def file_of(folder: Path, step: int) -> Path:
    (found,) = (folder / "local").glob(f"*/rank-0001/step-{step:06d}.safetensors")
    return found


@pytest.mark.parametrize(("asynchronous", "layout"), [(True, "fsdp"), (False, "fsdp"), (True, "hsdp")])
def test_the_newer_fast_state_is_taken(
    asynchronous: bool, layout: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    together(2, save_and_die, tmp_path, tiny_config, asynchronous, layout)
    together(2, load, tmp_path, tiny_config, 3, layout)


def lose(file: Path) -> None:
    file.unlink()


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [lose, flip_a_bit])
def test_if_one_process_lacks_it_all_take_the_durable_state(
    damage: Callable[[Path], None], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    together(2, save_and_die, tmp_path, tiny_config, True, "fsdp")
    damage(file_of(tmp_path, 3))
    damage(file_of(tmp_path, 2))
    together(2, load, tmp_path, tiny_config, 2, "fsdp")


def test_another_number_of_processes_takes_the_durable_state(tiny_config: ModelConfig, tmp_path: Path) -> None:
    together(2, save_and_die, tmp_path, tiny_config, True, "fsdp")
    load(World(), tmp_path, tiny_config, 2, "")
    together(3, load, tmp_path, tiny_config, 2, "fsdp")


def test_a_run_that_is_begun_anew_does_not_see_the_old_one(tiny_config: ModelConfig, tmp_path: Path) -> None:
    save_and_die(World(), tmp_path, tiny_config, True, "")
    shutil.rmtree(tmp_path / "state")
    made = spread("", tiny_config, World())
    assert Checkpointer(tmp_path / "state", World(), config_of(tmp_path)).load(made.model, made.optimiser) is None


def test_a_run_that_ends_well_leaves_nothing_in_it(tiny_config: ModelConfig, tmp_path: Path) -> None:
    made = spread("", tiny_config, World())
    with Checkpointer(tmp_path / "state", config=config_of(tmp_path)) as states:
        states.after_step(1, made.model, made.optimiser, {}, durable=True)
        states.wait()
        assert len(list((tmp_path / "local").glob("*/rank-0000/step-*"))) == 1
    assert list((tmp_path / "local").iterdir()) == []
