"""What a worker does for its launcher: it shows that it goes on, tells where it stands, and never outlives it.

A heartbeat is a small file on the worker's own machine, rewritten at every report of progress. SIGUSR1 makes the
process write the stacks of its threads beside it, even while it waits inside a collective.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from liaoyuan.rundir import Progress

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
ASK_FOR_STACKS = signal.SIGUSR1
LOST_PEER = 75  # exit code of a worker whose only trouble is that another one is gone (EX_TEMPFAIL)
LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "gloo/transport",
    "NCCL communicator was aborted",
    "remote process exited",
)


@dataclass(frozen=True)
class Beat:
    """Where a worker stands. `done` and `total` count steps; `ended` is its exit code once it ends by itself."""

    pid: int
    count: int = 0
    done: int = 0
    total: int = 0
    ended: int | None = None


class Heartbeat:
    """A worker's file `rank-0001.beat` in `folder`; a `Report`, so that it beats at every report of progress."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = beat_file(folder, rank)
        self._beat = Beat(os.getpid())
        # Kept open for as long as the process lives: the handler writes to the descriptor.
        self._stacks = stacks_file(folder, rank).open("w", encoding="utf-8")
        faulthandler.register(ASK_FOR_STACKS, file=self._stacks, all_threads=True)
        self._write()

    def __call__(self, progress: Progress) -> None:
        self._beat = Beat(self._beat.pid, self._beat.count + 1, progress.done, progress.total)
        self._write()

    def end(self, code: int) -> None:
        """Note that this process ends by itself with this exit code."""
        self._beat = Beat(self._beat.pid, self._beat.count + 1, self._beat.done, self._beat.total, code)
        self._write()

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self._beat)), encoding="utf-8")
        part.replace(self._path)


def beat_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.beat"


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.stacks"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Return where a worker stands; None before it has begun."""
    try:
        return Beat(**json.loads(beat_file(folder, rank).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return None


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its launcher dies, however that dies (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(LOST_PEER)  # it died before this line


def lost_peer(error: BaseException | None) -> str | None:
    """Return the words of `error`, or of what it came from, that say that another process is gone; else None."""
    while error is not None:
        if sign := next((sign for sign in LOST_PEER_SIGNS if sign in str(error)), None):
            return sign
        error = error.__cause__ or error.__context__
    return None
