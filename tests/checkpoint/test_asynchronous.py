"""Saving beside the training: what is blocked, what a kill at any moment leaves, and how failures are told."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from liaoyuan import rundir
from liaoyuan.checkpoint import staging, writer
from liaoyuan.checkpoint.training_state import CheckpointConfig, Checkpointer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import World
from tests.checkpoint.layouts import Spread, spread
from tests.checkpoint.processes import together

FAULTY = (sys.executable, "-I", "-S", str(Path(__file__).with_name("faulty_writer.py")), writer.__file__)
FORK = multiprocessing.get_context("fork")


def filled(config: ModelConfig, world: World | None = None) -> Spread:
    made = spread("fsdp", config, world or World())
    made.fill()
    return made


def save(states: Checkpointer, step: int, of: Spread) -> None:
    states.save(step, of.model, of.optimiser, {"tokens": step})


def newest(folder: Path, config: ModelConfig) -> int:
    """Load as a run that is started again does; return the step, having checked every tensor."""
    fresh = spread("", config, World())
    with Checkpointer(folder) as states:
        found = states.load(fresh.model, fresh.optimiser)
    assert found is not None and found[1] == {"tokens": found[0]}
    fresh.assert_filled()
    return found[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != staging.LOCK)


class Gate:
    """Holds the writer half way through a state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("reached", "go"):
            os.mkfifo(folder / name)

    def shut(self) -> None:
        (self.folder / "shut").touch()

    def wait_until_reached(self) -> None:
        os.close(os.open(self.folder / "reached", os.O_RDONLY))

    def open(self) -> None:
        os.close(os.open(self.folder / "go", os.O_WRONLY))


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Gate]:
    """Give the writer a fault from now on."""

    def use(fault: str) -> Gate:
        gate = Gate(tmp_path / "gate")
        monkeypatch.setattr(staging, "PROGRAM", (*FAULTY, fault, str(gate.folder)))
        return gate

    return use


def test_a_save_returns_before_it_is_on_the_disk_and_is_whole_when_waited_for(
    faulty: Callable[[str], Gate], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    gate, run = faulty("gate"), tmp_path / "run" / "state"
    gate.shut()
    with Checkpointer(run) as states:
        of = filled(tiny_config)
        save(states, 1, of)
        gate.wait_until_reached()
        assert names(run) != ["step-000001"]
        for parameter in of.model.parameters():
            parameter.data.zero_()  # the training goes on; what is saved is what was
        gate.open()
        states.wait()
        assert names(run) == ["step-000001"]
    assert newest(run, tiny_config) == 1


def test_as_many_states_as_asked_for_are_kept(tiny_config: ModelConfig, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "state", config=CheckpointConfig(keep=3)) as states:
        for step in range(1, 6):
            save(states, step, filled(tiny_config))
    assert names(tmp_path / "state") == ["step-000003", "step-000004", "step-000005"]


def train(run: Path, config: ModelConfig, gate: Gate) -> None:
    """Save step 1, then step 2, half way through which the writer stops; then go on for ever."""
    with Checkpointer(run) as states:
        of = filled(config)
        save(states, 1, of)
        states.wait()
        gate.shut()
        save(states, 2, of)
        signal.pause()


def writers_of(process: Any) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_trainer_killed_in_mid_write_loses_nothing_that_was_staged(
    faulty: Callable[[str], Gate], tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, run = faulty("gate"), tmp_path / "run" / "state"
    trainer = FORK.Process(target=train, args=(run, tiny_config, gate))
    trainer.start()
    gate.wait_until_reached()
    trainer.kill()
    trainer.join()
    assert [path.name for path in writer.states(run)] == ["step-000001"]
    openings = iter([gate.open])  # the run that is started again waits for the writer of the one before
    monkeypatch.setattr(rundir, "_pause", lambda: next(openings, os.sched_yield)())
    assert newest(run, tiny_config) == 2
    assert names(run) == ["step-000001", "step-000002"]


def test_a_trainer_and_its_writer_killed_in_mid_write_leave_the_state_before(
    faulty: Callable[[str], Gate], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    gate, run = faulty("gate"), tmp_path / "run" / "state"
    trainer = FORK.Process(target=train, args=(run, tiny_config, gate))
    trainer.start()
    gate.wait_until_reached()
    for number in (*writers_of(trainer), trainer.pid):
        os.kill(number, signal.SIGKILL)
    trainer.join()
    assert newest(run, tiny_config) == 1
    assert names(run) == ["step-000001"]


def test_a_killed_writer_is_told_at_the_next_step(
    faulty: Callable[[str], Gate], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    gate, run = faulty("gate"), tmp_path / "run" / "state"
    with pytest.raises(LiaoyuanError, match=r"writes checkpoints to .*state died \(exit code -9\)"):  # noqa: SIM117
        with Checkpointer(run) as states:
            of = filled(tiny_config)
            save(states, 1, of)
            states.wait()
            gate.shut()
            save(states, 2, of)
            gate.wait_until_reached()
            process = states._way._process  # type: ignore[union-attr]
            process.kill()
            process.wait()
            states.after_step(3, of.model, of.optimiser, {})
    assert newest(run, tiny_config) == 1
    assert names(run) == ["step-000001"]


def test_a_full_disk_is_told_at_the_next_step_and_leaves_the_state_before(
    faulty: Callable[[str], Gate], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    gate, run = faulty("full"), tmp_path / "run" / "state"
    with pytest.raises(LiaoyuanError, match=r"The disk is full: .*state got no checkpoint\. Free some space"):  # noqa: SIM117
        with Checkpointer(run) as states:
            of = filled(tiny_config)
            save(states, 1, of)
            states.wait()
            gate.shut()
            save(states, 2, of)
            states.wait()
    assert names(run) == ["step-000001"]
    assert newest(run, tiny_config) == 1


def save_without_a_group(world: World, run: Path, config: ModelConfig) -> None:
    of = filled(config, world)
    states = Checkpointer(run, world)
    save(states, 1, of)
    dist.destroy_process_group()  # from now on any exchange fails
    for step in (2, 3):
        save(states, step, of)
        states.wait()


def test_no_save_but_the_first_exchanges_anything(tiny_config: ModelConfig, tmp_path: Path) -> None:
    uneven = replace(tiny_config, head_dim=6)  # of which one of four processes has nothing
    together(4, save_without_a_group, tmp_path / "state", uneven)
    assert names(tmp_path / "state") == ["step-000002", "step-000003"]
    assert newest(tmp_path / "state", uneven) == 3


def fail_in_one(world: World, run: Path, config: ModelConfig, gate: Gate, fault: str) -> None:
    """Save step 1; then the second process's part fails. Each process leaves what it was told."""
    of = filled(config, world)
    if world.rank == 1:
        staging.PROGRAM = (*FAULTY, "gate" if fault == "killed writer" else "full", str(gate.folder))
    states = Checkpointer(run, world, CheckpointConfig(asynchronous=fault != "direct"))
    save(states, 1, of)
    states.wait()
    if world.rank == 1:
        gate.shut()
        writer._write = full
    try:
        save(states, 2, of)
        if world.rank == 1 and fault == "killed writer":
            gate.wait_until_reached()
            states._way._process.kill()  # type: ignore[union-attr]
        states.wait()
    except LiaoyuanError as error:
        (run.parent / f"told-{world.rank}").write_text(str(error))


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "first", "second"),
    [
        ("direct", "Another process could not write to ", "The disk is full: "),
        ("full disk", "the part rank-0001.safetensors of ", "The disk is full: "),
        ("killed writer", "the part rank-0001.safetensors of ", "The process that writes checkpoints to "),
    ],
)
def test_if_one_process_cannot_write_all_are_told_and_nothing_looks_whole(
    fault: str, first: str, second: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    together(2, fail_in_one, tmp_path / "state", tiny_config, Gate(tmp_path / "gate"), fault)
    assert first in (tmp_path / "told-0").read_text()
    assert (tmp_path / "told-1").read_text().startswith(second)
    assert newest(tmp_path / "state", tiny_config) == 1
    assert names(tmp_path / "state") == ["step-000001"]


def test_a_part_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write_part(tmp_path / "part" / "rank-0000.safetensors", [], [], {})
    assert names(tmp_path / "part") == []


def test_a_part_that_comes_while_its_writer_ends_is_not_missed(tmp_path: Path) -> None:
    def last_look() -> bool:
        writer.write_part(part / writer.part_name(1), [], [], {})
        return False  # the other writer is gone: nothing more will come

    part = tmp_path / "part"
    writer.write_part(part / writer.part_name(0), [], [], {})
    writer.publish(part, tmp_path / "step-000001", 2, {"step": 1}, last_look)
    assert names(tmp_path / "step-000001") == ["rank-0000.safetensors", "rank-0001.safetensors", "state.json"]


def hold(folder: Path, held: Any) -> None:
    with Checkpointer(folder / "state"):
        held.set()
        signal.pause()


def test_two_jobs_do_not_write_in_one_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "LOCK_PATIENCE", 0.0)
    held = FORK.Event()
    other = FORK.Process(target=hold, args=(tmp_path, held))
    other.start()
    held.wait()
    try:
        with pytest.raises(LiaoyuanError, match=rf"is in use by process {other.pid} on \S+: stop it"):  # noqa: SIM117
            with Checkpointer(tmp_path / "state"):
                pass
    finally:
        other.kill()
        other.join()
    with Checkpointer(tmp_path / "state"):
        pass
