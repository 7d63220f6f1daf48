"""Training state on disk: what a killed run needs to go on bit for bit, in safetensors, never pickled.

A state is a folder `step-000123`: `state.json` (step, identity, which tensor lies where, checksums) and one part for
each process that wrote it. It appears whole or not at all, any number of processes under any layout can read it, and
the newest few are kept, so that one which the disk has damaged does not end the run.

`Checkpointer` is what a training loop uses: it plans once, writes beside the training and keeps a fast local tier.
`save_state` and `load_state` are single calls of the same.
"""

import json
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from liaoyuan.checkpoint.local_tier import LocalTier
from liaoyuan.checkpoint.plan import PartPlan, make_plan
from liaoyuan.checkpoint.reading import Damaged, read_manifest, read_tensors, refuse_incomplete
from liaoyuan.checkpoint.staging import LOCK, Beside, Direct, Job, Way
from liaoyuan.checkpoint.tensors import OPTIMISER, Optimiser, local_tensors, whole_tensors
from liaoyuan.checkpoint.writer import TEMPORARY, Durable, state_name, states, step_of
from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Lock, disk_errors, sweep

log = logging.getLogger(__name__)

LONG_WAIT = 1.0  # seconds for which a save waits for the one before it without a word
WRITERS_PATIENCE = 300.0  # seconds for the writers of a run that was killed to finish its last state


class CheckpointConfig(Config):
    """How states are saved. How often is `train.checkpoint_every`. A resumed run may be given others."""

    keep: int = Field(2, gt=0)  # newest states that are not deleted
    asynchronous: bool = True  # copy to memory, and let a process beside the training write
    local: Path | None = None  # folder of a fast tier, each process's own: /dev/shm or a local NVMe disk
    local_every: int = Field(0, ge=0)  # steps between saves to it; 0 is none


def save_state(
    folder: Path,
    step: int,
    model: Decoder | Program,
    optimiser: Optimiser,
    extra: dict[str, Any] | None = None,
    world: World | None = None,
) -> None:
    """Write `folder/step-<step>` and delete all but the newest two. `step` steps are done; `extra` is JSON.

    Of several processes each makes the call and writes its own part; the folder appears once all are on disk.

    Raises:
        LiaoyuanError: some process could not write (disk full); the older states are as they were.
    """
    Checkpointer(folder, world, CheckpointConfig(asynchronous=False)).save(step, model, optimiser, extra)


def load_state(
    folder: Path, model: Decoder | Program, optimiser: Optimiser, world: World | None = None
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest whole state; see `Checkpointer.load`."""
    return Checkpointer(folder, world, CheckpointConfig(asynchronous=False)).load(model, optimiser)


class Checkpointer:
    """Saves and loads the states in one folder. As a context it holds the run folder, so that no other job writes.

    Asynchronous saves copy the state to shared memory and return; a save that is due while one is in flight waits
    for it (all processes must save the same steps, and asking whether to skip one would be an exchange). The local
    tier needs no such agreement: its save is left out while the writer is busy.

    Every process calls `load` and `save` at the same steps. The first of these calls plans together; no later save
    exchanges anything.
    """

    def __init__(self, folder: Path, world: World | None = None, config: CheckpointConfig | None = None) -> None:
        self.blocked_seconds = 0.0  # for which saves held the training up, all together
        self._folder, self._world = folder, world or World()
        self._config = config or CheckpointConfig()
        self._local = LocalTier.open(folder, self._config.local, self._world) if self._config.local else None
        self._plan: PartPlan | None = None
        self._way: Way | None = None
        self._token = ""
        self._lock = Lock(folder.parent)

    def __enter__(self) -> "Checkpointer":
        """Hold the run folder. Raises LiaoyuanError in every process if another job has it."""
        refusal = "none"
        if self._world.is_first:
            try:
                self._lock.take()
            except LiaoyuanError as error:
                refusal = str(error)
        refusal = self._world.broadcast(refusal)
        if refusal != "none":
            raise LiaoyuanError(refusal)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
                if self._local:
                    self._local.clear()  # the durable tier has the last state
        finally:
            if self._way:
                self._way.close()
            self._lock.release()

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight. Raises LiaoyuanError if it has failed."""
        return self._way is not None and self._way.is_busy

    def after_step(
        self, step: int, model: Decoder | Program, optimiser: Optimiser, extra: dict[str, Any], durable: bool = False
    ) -> None:
        """Save what is due: a durable state if asked for, one of the local tier every `local_every` steps.

        Raises:
            LiaoyuanError: the save in flight has failed.
        """
        is_busy = self.is_busy
        local = self._local is not None and self._config.local_every > 0 and step % self._config.local_every == 0
        if durable or (local and not is_busy):
            self._save(step, model, optimiser, extra, durable, local)

    def save(
        self, step: int, model: Decoder | Program, optimiser: Optimiser, extra: dict[str, Any] | None = None
    ) -> None:
        """Save a durable state; returns as soon as the state is copied if this is asynchronous.

        Raises:
            LiaoyuanError: this save, or the asynchronous one before it, has failed; older states are as they were.
        """
        self._save(step, model, optimiser, extra or {}, durable=True, local=False)

    def wait(self) -> None:
        """Wait until what was saved is on the disk. Raises LiaoyuanError if it is not going to be."""
        if self._way:
            self._way.wait()

    def load(self, model: Decoder | Program, optimiser: Optimiser) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole state of either tier; return its step and `extra`, or None if there is none.

        A damaged state is passed over with a warning; the one before it is taken. A save in flight is waited for.

        Raises:
            LiaoyuanError: every state is damaged, or the state is of another model or optimiser, or lacks a tensor.
        """
        if self._way:  # a run that goes back: its own writers first
            self._way.wait()
            self._way.close()
            self._way = None
        self._settle()
        tensors = {
            name: torch.empty_like(value) if name.startswith(OPTIMISER) else value
            for name, value in local_tensors(model, optimiser).items()
        }
        candidates = self._candidates()
        for tier, step in candidates:
            load = self._load_local if tier == "local" else self._load_durable
            found = load(step, model, optimiser, tensors)
            if found is not None:
                of_optimiser = {name: value for name, value in tensors.items() if name.startswith(OPTIMISER)}
                optimiser.load({name.removeprefix(OPTIMISER): value for name, value in of_optimiser.items()})
                return step, found
        if any(tier == "durable" for tier, _ in candidates):
            folder = self._folder
            raise LiaoyuanError(f"Every checkpoint in {folder} is truncated or corrupt; delete it to start afresh.")
        return None

    def _save(
        self,
        step: int,
        model: Decoder | Program,
        optimiser: Optimiser,
        extra: dict[str, Any],
        durable: bool,
        local: bool,
    ) -> None:
        start = time.perf_counter()
        tensors = local_tensors(model, optimiser)
        way = self._prepared(model, tensors)
        ready = time.perf_counter()
        way.wait()
        waited = time.perf_counter() - ready
        if waited > LONG_WAIT and self._world.is_first:
            log.warning("A save waited %.1f s for the one before it: save less often, or to a faster disk.", waited)
        about = {"step": step, **identity_of(model, optimiser), "extra": extra}
        way.write(
            tensors,
            Job(
                self._durable_job(step, about) if durable else None,
                self._local.job(step, about) if local and self._local else None,
            ),
        )
        self.blocked_seconds += time.perf_counter() - start

    def _prepared(self, model: Decoder | Program, tensors: Mapping[str, Tensor]) -> Way:
        """Return the way to the disk for `tensors`; it is made at the first save and when the state has changed."""
        plan = self._plan_for(model, tensors)
        if self._way is None:
            with disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            self._way = Beside(plan, self._folder) if self._config.asynchronous else Direct(plan, self._world)
        return self._way

    def _plan_for(self, model: Decoder | Program, tensors: Mapping[str, Tensor]) -> PartPlan:
        if self._plan is None or not self._plan.fits(tensors):
            if self._way:
                self._way.wait()
                self._way.close()
                self._way = None
            self._plan = make_plan(whole_tensors(model, tensors), self._world)
            self._token = self._world.broadcast(secrets.token_hex(4))
        return self._plan

    def _durable_job(self, step: int, about: dict[str, Any]) -> Durable:
        part = self._folder / f"{TEMPORARY}{state_name(step)}-{self._token}"
        manifest = about if self._world.is_first else {}
        rank, size = self._world.rank, self._world.size
        return Durable(str(self._folder), str(part), step, rank, size, self._config.keep, manifest)

    def _settle(self) -> None:
        """Let the writers of a killed run finish, then delete what it left half written."""
        if self._world.is_first and self._folder.exists():
            Lock(self._folder, LOCK, WRITERS_PATIENCE).pass_through()
            sweep(self._folder)
        if self._local:
            self._local.sweep()
        self._world.barrier()

    def _candidates(self) -> list[tuple[str, int]]:
        """Return the tier and step of each state, the newest first; the first process decides."""
        found = [("durable", step_of(path)) for path in states(self._folder)]
        found += [("local", step) for step in self._local.steps()] if self._local else []
        found.sort(key=lambda state: (state[1], state[0]), reverse=True)
        return [(tier, step) for tier, step in json.loads(self._world.broadcast(json.dumps(found)))]

    def _load_durable(
        self, step: int, model: Decoder | Program, optimiser: Optimiser, tensors: dict[str, Tensor]
    ) -> dict[str, Any] | None:
        """Return the `extra` of a state and fill `tensors` from it, or None if it is damaged."""
        path = self._folder / state_name(step)
        manifest: dict[str, Any] = {}
        try:
            manifest = read_manifest(path)
        except Damaged as error:
            log.info("%s", error)
        if not self._everywhere(bool(manifest), path):
            return None
        _refuse_another(manifest, identity_of(model, optimiser), path)
        wanted = whole_tensors(model, tensors)
        refuse_incomplete(manifest, wanted, path, self._world)
        whole = False
        try:
            read_tensors(path, manifest, wanted)
            whole = True
        except Damaged as error:
            log.info("%s", error)
        return manifest["extra"] if self._everywhere(whole, path) else None

    def _everywhere(self, whole: bool, path: Path) -> bool:
        """Return whether the state is whole for every process, and warn if it is not."""
        (damaged,) = self._world.sum_numbers(float(not whole))
        if damaged and self._world.is_first:
            log.warning("The checkpoint %s is truncated or corrupt; going on from the one before it.", path)
        return not damaged

    def _load_local(
        self, step: int, model: Decoder | Program, optimiser: Optimiser, tensors: dict[str, Tensor]
    ) -> dict[str, Any] | None:
        """Return the `extra` of a state of the local tier, or None if any process lacks it or has another layout."""
        assert self._local
        about, blocks = self._local.read(step, self._plan_for(model, tensors)) or ({}, {})
        identity = identity_of(model, optimiser)
        is_ours = all(about.get(part) == ours for part, ours in identity.items())
        (lacking,) = self._world.sum_numbers(float(not is_ours))
        if lacking:
            return None
        with torch.no_grad():
            for name, block in blocks.items():
                tensors[name].copy_(block)
        return about["extra"]


def identity_of(model: Decoder | Program, optimiser: Optimiser) -> dict[str, Any]:
    """Return what a state must agree with: the model and the optimiser, as a manifest holds them."""
    identity = {"model": model.config.to_dict(), "optimiser": optimiser.describe()}
    plain: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read back
    return plain


def _refuse_another(manifest: Mapping[str, Any], identity: Mapping[str, Any], path: Path) -> None:
    for part, ours in identity.items():
        theirs = manifest[part]
        key = next((key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)), None)
        if key is not None:
            raise LiaoyuanError(
                f"{path} belongs to another run: its {part}'s {key} is {theirs.get(key)!r}, here it is "
                f"{ours.get(key)!r}; choose another run folder."
            )
