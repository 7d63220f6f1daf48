"""How the bytes of a save reach the disk: at once, or by way of shared memory and a process beside the trainer.

Both ways have the same words: `write` a job, `is_busy` with it, `wait` for it, `close`.
"""

import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from liaoyuan.checkpoint import writer
from liaoyuan.checkpoint.plan import PartPlan
from liaoyuan.checkpoint.tensors import TORCH_DTYPES
from liaoyuan.checkpoint.writer import Durable, Local, Piece
from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import World

PROGRAM = (sys.executable, "-I", "-S", writer.__file__)  # without site packages, so that it starts in milliseconds
LOCK = ".writers"  # in the folder of states: held by all processes that write there
CLOSE_SECONDS = 5.0  # for a writer whose trainer ends; one that needs longer goes on alone


@dataclass(frozen=True)
class Job:
    """One save: to the durable tier, the local one, or both."""

    durable: Durable | None = None
    local: Local | None = None


class Way(Protocol):
    """A way to the disk."""

    def write(self, tensors: Mapping[str, Tensor], job: Job) -> None: ...

    @property
    def is_busy(self) -> bool: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


class Direct:
    """Writes before it returns, and every process learns whether all could."""

    is_busy = False

    def __init__(self, plan: PartPlan, world: World) -> None:
        self._plan, self._world = plan, world

    def write(self, tensors: Mapping[str, Tensor], job: Job) -> None:
        """Write and publish. Raises LiaoyuanError in every process if one of them could not."""
        self._together(job, lambda: self._write(tensors, job))
        self._together(job, lambda: self._publish(job))

    def wait(self) -> None:
        """Nothing is in flight."""

    def close(self) -> None:
        """Nothing is held."""

    def _write(self, tensors: Mapping[str, Tensor], job: Job) -> None:
        if job.local:
            pieces = self._plan.pieces
            writer.write_local(job.local, pieces, [_bytes(tensors[piece.name]) for piece in pieces])
        if job.durable:
            own = self._plan.own
            writer.write_durable(job.durable, own, [_bytes(tensors[piece.name]) for piece in own])

    def _publish(self, job: Job) -> None:
        if job.durable and self._world.is_first:
            writer.publish_durable(job.durable, lambda: False)

    def _together(self, job: Job, work: Callable[[], None]) -> None:
        """Do this process's work and wait for the others; what went wrong in one is raised in all."""
        failure: OSError | None = None
        try:
            work()
        except OSError as error:
            failure = error
        (failed,) = self._world.sum_numbers(float(failure is not None))
        if failed:
            if job.durable and self._world.is_first:
                writer.discard(job.durable)
            folder = _folder(job)
            told = writer.sentence(failure, folder) if failure else f"Another process could not write to {folder}."
            raise LiaoyuanError(told) from failure


class Beside:
    """Copies into shared memory and returns; a process beside this one writes (see `checkpoint.writer`).

    The memory is taken once and used again, so that a state costs its own size once more, never twice.
    """

    def __init__(self, plan: PartPlan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._busy: Job | None = None
        handle = _anonymous_file(plan.nbytes)
        self._views = _views(handle, plan)
        self._process = self._start(handle)
        os.close(handle)
        self._replies = select.poll()
        self._replies.register(self._process.stdout, select.POLLIN)  # type: ignore[arg-type]
        self._read()  # that it is ready: from now on it holds the lock

    @property
    def is_busy(self) -> bool:
        """Whether a job is in flight; does not wait. Raises LiaoyuanError if it has failed."""
        if self._busy and self._replies.poll(0):
            self.wait()
        return self._busy is not None

    def write(self, tensors: Mapping[str, Tensor], job: Job) -> None:
        """Copy the tensors and hand the job over; waits first if the job before is not done."""
        self.wait()
        with torch.no_grad():
            torch._foreach_copy_(list(self._views.values()), [tensors[name] for name in self._views])
        self._busy = job
        self._tell({key: value and vars(value) for key, value in vars(job).items()})

    def wait(self) -> None:
        """Wait until the job in flight is on the disk. Raises LiaoyuanError if it failed."""
        if self._busy:
            words = self._read()
            self._busy = None
            if "error" in words:
                raise LiaoyuanError(words["error"])

    def close(self) -> None:
        """Let the process finish what it does and end."""
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self._process.stdout.close()  # type: ignore[union-attr]

    def _start(self, handle: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=[handle],
            start_new_session=True,  # neither Ctrl-C nor the end of the trainer's group ends a save in flight
        )
        self._process = process
        pieces = {"own": [vars(p) for p in self._plan.own], "spare": [vars(p) for p in self._plan.spare]}
        lock = str(self._folder / LOCK)
        self._tell({**pieces, "buffer": handle, "nbytes": self._plan.nbytes, "lock": lock})
        return process

    def _tell(self, words: dict[str, Any]) -> None:
        data = memoryview(json.dumps(words).encode() + b"\n")
        with suppress(BrokenPipeError):  # then there is no reply either
            while data:
                data = data[self._process.stdin.write(data) :]  # type: ignore[union-attr]

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line.endswith(b"\n"):
            if self._busy and self._busy.durable:
                writer.mark_failed(self._busy.durable)
            self._busy = None
            raise LiaoyuanError(
                f"The process that writes checkpoints to {self._folder} died (exit code {self._process.wait()}); "
                "the states saved before are whole. Look for the kernel's out-of-memory killer, and run again."
            )
        words: dict[str, Any] = json.loads(line)
        return words


def _anonymous_file(nbytes: int) -> int:
    """Return a file of memory that has no name, so that nothing is left behind, however the processes end."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("liaoyuan-checkpoint", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, nbytes)
    return handle


def _views(handle: int, plan: PartPlan) -> dict[str, Tensor]:
    """Return, for each piece, the tensor in shared memory that it is copied to."""
    if not plan.nbytes:
        return {}
    whole = torch.frombuffer(mmap.mmap(handle, plan.nbytes), dtype=torch.uint8)
    return {piece.name: _view(whole, piece) for piece in plan.pieces}


def _view(whole: Tensor, piece: Piece) -> Tensor:
    data = whole[piece.start : piece.start + piece.nbytes]
    return data.view(TORCH_DTYPES[piece.dtype]).view(piece.shape)


def _bytes(tensor: Tensor) -> memoryview:
    plain: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(plain)


def _folder(job: Job) -> str:
    return job.durable.folder if job.durable else job.local.folder if job.local else ""
