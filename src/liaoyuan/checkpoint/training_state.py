"""Training state on disk: what a killed run needs to go on bit for bit, in safetensors, never pickled.

A state is a folder `step-000123` with `state.json` (step, identity) and one shard of tensors, with its checksum, for
each process. It appears whole or not at all; the newest two are kept, so that one which the disk has damaged does not
end the run.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.parallel import Program, World, local
from liaoyuan.rundir import TEMPORARY, atomic_folder, read_json, sweep

KEPT = 2
MANIFEST = "state.json"
log = logging.getLogger(__name__)


class Optimiser(Protocol):
    """What a checkpoint asks of an optimiser."""

    def describe(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...


def save_state(
    folder: Path,
    step: int,
    model: Decoder | Program,
    optimiser: Optimiser,
    extra: dict[str, Any] | None = None,
    world: World | None = None,
) -> None:
    """Write `folder/step-<step>` and delete all but the newest two. `step` steps are done; `extra` is JSON.

    With FSDP every process calls it and writes its own shard; the folder appears once all of them are on disk.

    Raises:
        LiaoyuanError: some process could not write (disk full); the older states are as they were.
    """
    world = world or World()
    target = folder / f"step-{step:06d}"
    with atomic_folder(target) if world.is_first else nullcontext(target) as part:
        part = Path(world.broadcast(str(part)))
        _write_shard(part, _tensors(model, optimiser), world)
        if world.is_first:
            manifest = {"step": step, **_identity(model, optimiser, world), "extra": extra or {}}
            (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    world.barrier()
    if world.is_first:
        for old in _states(folder)[KEPT:]:
            _remove(old)


def load_state(
    folder: Path, model: Decoder | Program, optimiser: Optimiser, world: World | None = None
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest whole state into `model` and `optimiser`; return its step and `extra`, or None if none is there.

    A damaged state is passed over with a warning; the one before it is taken.

    Raises:
        LiaoyuanError: every state is damaged, or the state is of another model, optimiser or number of processes.
    """
    world = world or World()
    if world.is_first:
        sweep(folder)
    world.barrier()
    states = _states(folder)
    for path in states:
        found = _read(path, world)
        if found is None:
            log.warning("The checkpoint %s is truncated or corrupt; going on from the one before it.", path)
            continue
        manifest, tensors = found
        _refuse_another(manifest, _identity(model, optimiser, world), path)
        _restore(model, optimiser, tensors)
        return manifest["step"], manifest["extra"]
    if states:
        raise LiaoyuanError(f"Every checkpoint in {folder} is truncated or corrupt; delete it to start afresh.")
    return None


def _tensors(model: Decoder | Program, optimiser: Optimiser) -> dict[str, Tensor]:
    weights = {f"model.{name}": local(parameter.detach()) for name, parameter in model.named_parameters()}
    state = {f"optimiser.{name}": value for name, value in optimiser.state().items()}
    return {name: value.cpu().contiguous() for name, value in {**weights, **state}.items()}


def _identity(model: Decoder | Program, optimiser: Optimiser, world: World) -> dict[str, Any]:
    identity = {"model": model.config.to_dict(), "optimiser": optimiser.describe(), "processes": world.size}
    plain: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read back
    return plain


def _refuse_another(manifest: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    for part in ("processes", "model", "optimiser"):
        ours, theirs = identity[part], manifest[part]
        if ours == theirs:
            continue
        if part != "processes":
            key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
            part, ours, theirs = f"{part}'s {key}", ours.get(key), theirs.get(key)
        raise LiaoyuanError(
            f"{path} belongs to another run: its {part} is {theirs!r}, here it is {ours!r}; choose another run folder."
        )


def _write_shard(part: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write this process's shard into `part` and return once every process has written its own."""
    failure: Exception | None = None
    try:
        path = _shard(part, world)
        save_file(tensors, path, metadata={"crc32": _checksum(tensors)})
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        failure = error
    (failed,) = world.sum_numbers(float(failure is not None))
    if failure is not None and _is_disk_full(failure):
        raise LiaoyuanError(f"The disk is full: {part.parent} got no checkpoint. Free some space and run again.")
    if failed:
        raise failure or LiaoyuanError(f"Another process could not write its part of the checkpoint {part}.")


def _read(path: Path, world: World) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the manifest and this process's tensors, or None if any process's part is damaged."""
    found, processes = None, -1
    try:
        manifest = read_json(path / MANIFEST)
        processes = manifest["processes"]
        with safe_open(_shard(path, world), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if file.metadata()["crc32"] == _checksum(tensors):
                found = manifest, tensors
    except (OSError, SafetensorError, LiaoyuanError, KeyError, TypeError):
        if processes not in (-1, world.size):  # not damage: the shards are those of other processes
            found = manifest, {}
    (damaged,) = world.sum_numbers(float(found is None))
    return None if damaged else found


def _restore(model: Decoder | Program, optimiser: Optimiser, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        local(parameter.detach()).copy_(tensors[f"model.{name}"])
    prefix = "optimiser."
    optimiser.load({name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})


def _states(folder: Path) -> list[Path]:
    """Return the states in `folder`, the newest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _remove(state: Path) -> None:
    """Delete a state so that a kill in between leaves nothing that looks like one."""
    doomed = Path(tempfile.mkdtemp(dir=state.parent, prefix=TEMPORARY))
    state.rename(doomed / state.name)
    shutil.rmtree(doomed)


def _shard(state: Path, world: World) -> Path:
    return state / f"rank-{world.rank:04d}.safetensors"


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), value)  # type: ignore[arg-type]
    return f"{value:08x}"


def _is_disk_full(failure: Exception) -> bool:
    number = failure.errno if isinstance(failure, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(failure)
