"""The files of a checkpoint, and the program that writes them beside a trainer. Standard library only.

As a program it starts in milliseconds, holds no copy of torch, and finishes the save in flight if its trainer dies:
`python writer.py`, told what to do by lines of JSON on its standard input. The trainer's tensors lie in shared memory.

A state is a folder `step-000123`: each process writes one part `rank-0003.safetensors` into a temporary folder, and
the first process, once all parts are there, adds `state.json` (which tensor lies where, and checksums) and renames
the folder. So processes agree through the file system, and a folder with a state's name is whole.
"""

import errno
import fcntl
import json
import mmap
import os
import select
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "state.json"
FORMAT = 2
TEMPORARY = ".part-"  # as in `liaoyuan.rundir`, whose `sweep` deletes what a kill left behind
OLD = TEMPORARY + "old-"
FAILED = ".failed"
SLICE = 16 * 2**20  # bytes of one write
NICENESS = 10  # the trainer goes first where cores are short
PATIENCE = 60.0  # seconds for the other parts of a save whose trainer has died
POLL = 0.02  # seconds between two looks for the other parts


@dataclass(frozen=True)
class Piece:
    """A block of one tensor, as one process has it: the block's place in the whole tensor, and in the buffer."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]  # of the block
    offsets: tuple[int, ...]  # where the block begins in the whole tensor
    size: tuple[int, ...]  # of the whole tensor
    start: int  # byte in the staging buffer
    nbytes: int

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Piece":
        """Return the piece that JSON made of `vars`."""
        tuples: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**tuples)


def write_part(path: Path, pieces: Sequence[Piece], views: Sequence[memoryview], about: dict[str, Any]) -> None:
    """Write a safetensors file of `pieces`, whose bytes are `views`, with their checksums; whole or not at all.

    Raises:
        OSError: as the disk says; what was half written is gone.
    """
    checksums = [f"{zlib.crc32(view):08x}" for view in views]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with temporary.open("wb", buffering=0) as file:
            _write(file.fileno(), _header(pieces, checksums, about))
            for view in views:
                _write(file.fileno(), view)
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_header(path: Path) -> tuple[list[Piece], list[str], dict[str, Any]]:
    """Return what `write_part` was given: the pieces, their checksums and `about`.

    Raises:
        OSError, ValueError, KeyError: the file is missing or torn.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size:
            raise ValueError(f"{path} is torn")
        part = json.loads(json.loads(file.read(length))["__metadata__"]["part"])
    pieces = [Piece.read(piece) for piece in part["pieces"]]
    return pieces, part["checksums"], part["about"]


def publish(part: Path, target: Path, processes: int, manifest: dict[str, Any], wait: Callable[[], bool]) -> None:
    """Wait for the parts of all processes in `part`, add the manifest and make the folder `target`.

    `wait` is called between two looks and returns whether to go on waiting.

    Raises:
        OSError: the disk is full, or another process could not write its part.
    """
    names = [part_name(rank) for rank in range(processes)]
    while missing := _missing(part, names):
        failed = next((name for name in missing if (part / (name + FAILED)).exists()), None)
        if failed or (not wait() and _missing(part, names)):  # the last one may have come just now
            shutil.rmtree(part, ignore_errors=True)
            raise InterruptedError(f"the part {failed or missing[0]} of {target} was not written")
    _write_manifest(part / MANIFEST, {**manifest, **_table(part, names)})
    fsync_folder(part)
    old = target.with_name(OLD + target.name)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    fsync_folder(target.parent)


def retire(folder: Path, step: int, keep: int) -> None:
    """Delete all states up to `step` in `folder` but the newest `keep`; a kill leaves nothing that looks like one."""
    for old in [state for state in states(folder) if step_of(state) <= step][keep:]:
        doomed = old.with_name(TEMPORARY + "doomed-" + old.name)
        shutil.rmtree(doomed, ignore_errors=True)
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def states(folder: Path) -> list[Path]:
    """Return the states in `folder`, the newest first."""
    return sorted(folder.glob("step-*"), key=step_of, reverse=True)


def state_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(state: Path) -> int:
    digits = state.name.removeprefix("step-").partition(".")[0]
    return int(digits) if digits.isdecimal() else -1


def part_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def sealed(manifest: dict[str, Any]) -> str:
    """Return the text of a manifest, with the checksum of all the rest of it."""
    return json.dumps({**manifest, "crc32": checksum_of(manifest)})


def checksum_of(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def sentence(error: OSError, folder: str | Path) -> str:
    """Say what went wrong, where, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {folder} got no checkpoint. Free some space and run again."
    return f"{folder} got no checkpoint: {error.strerror or error}."


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(pieces: Sequence[Piece], checksums: list[str], about: dict[str, Any]) -> bytes:
    part = {"pieces": [vars(piece) for piece in pieces], "checksums": checksums, "about": about}
    header: dict[str, Any] = {"__metadata__": {"part": json.dumps(part)}}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.nbytes
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(handle: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left[:SLICE]) :]


def _table(part: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the manifest's table of all tensors, put together from the headers of the parts."""
    tensors: dict[str, Any] = {}
    for number, name in enumerate(names):
        pieces, checksums, _ = read_header(part / name)
        for piece, checksum in zip(pieces, checksums, strict=True):
            entry = tensors.setdefault(piece.name, {"dtype": piece.dtype, "size": piece.size, "pieces": []})
            entry["pieces"].append([number, piece.offsets, piece.shape, checksum])
    return {"format": FORMAT, "files": list(names), "tensors": tensors}


def _missing(part: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (part / name).exists()]


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(sealed(json.loads(json.dumps(manifest))))
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Durable:
    """Where this process's part of a state goes; the first process also publishes the state."""

    folder: str  # of all states
    part: str  # the temporary folder of this one
    step: int
    rank: int
    processes: int
    keep: int
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Local:
    """The file of this process's fast tier that holds all that it has, shared tensors included."""

    folder: str
    step: int
    keep: int
    about: dict[str, Any]


def write_durable(job: Durable, pieces: Sequence[Piece], views: Sequence[memoryview]) -> None:
    """Write this process's part of a state."""
    path = Path(job.part) / part_name(job.rank)
    try:
        write_part(path, pieces, views, {"step": job.step})
    except OSError:
        mark_failed(job)
        raise


def publish_durable(job: Durable, wait: Callable[[], bool]) -> None:
    """Publish the state and delete those that are too old."""
    folder = Path(job.folder)
    publish(Path(job.part), folder / state_name(job.step), job.processes, job.manifest, wait)
    retire(folder, job.step, job.keep)


def discard(job: Durable) -> None:
    """Delete the parts of a state that will not be published."""
    shutil.rmtree(job.part, ignore_errors=True)


def mark_failed(job: Durable) -> None:
    """Tell the first process, which waits for it, that this part will not come."""
    try:
        (Path(job.part) / (part_name(job.rank) + FAILED)).touch()
    except OSError:
        return  # then the end of the trainer tells it


def write_local(job: Local, pieces: Sequence[Piece], views: Sequence[memoryview]) -> None:
    """Write a state of the fast tier and delete those that are too old."""
    folder = Path(job.folder)
    write_part(folder / f"{state_name(job.step)}.safetensors", pieces, views, job.about)
    for old in states(folder)[job.keep :]:
        old.unlink(missing_ok=True)


def main() -> None:
    """Hold the lock of the folder's writers, then do one job after another until the trainer is gone."""
    os.nice(NICENESS)
    setup = json.loads(sys.stdin.readline())
    own, spare = ([Piece.read(piece) for piece in setup[key]] for key in ("own", "spare"))
    memory = memoryview(mmap.mmap(setup["buffer"], setup["nbytes"], prot=mmap.PROT_READ)) if setup["nbytes"] else b""
    views = {piece: memoryview(memory)[piece.start : piece.start + piece.nbytes] for piece in (*own, *spare)}
    with Path(setup["lock"]).open("a+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_SH)
        _reply({"ready": True})
        for line in sys.stdin:
            _reply(_run(json.loads(line), own, spare, views, lock.fileno()))


def _run(
    job: dict[str, Any], own: list[Piece], spare: list[Piece], views: dict[Piece, memoryview], lock: int
) -> dict[str, Any]:
    started, folder = time.monotonic(), ""
    try:
        if job["local"]:
            folder = job["local"]["folder"]
            write_local(Local(**job["local"]), [*own, *spare], [views[piece] for piece in (*own, *spare)])
        if job["durable"]:
            folder = job["durable"]["folder"]
            durable = Durable(**job["durable"])
            write_durable(durable, own, [views[piece] for piece in own])
            if durable.rank == 0:
                publish_durable(durable, _Waiting(lock))
    except OSError as error:
        if job["durable"] and job["durable"]["rank"] == 0:
            discard(Durable(**job["durable"]))
        return {"error": sentence(error, folder)}
    return {"seconds": time.monotonic() - started}


class _Waiting:
    """Waits for other processes' parts: as long as the trainer lives, and then while another writer is at work."""

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._end: float | None = None

    def __call__(self) -> bool:
        if self._end is None:
            readable, _, _ = select.select([sys.stdin], [], [], POLL)
            if not readable:
                return True
            self._end = time.monotonic() + PATIENCE  # no job comes before a reply: the trainer is dead
        time.sleep(POLL)
        return time.monotonic() < self._end and not self._is_alone()

    def _is_alone(self) -> bool:
        """Whether no other process writes in this folder, so that what is missing will stay so."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.lockf(self._lock, fcntl.LOCK_SH)
        return True


def _reply(words: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(words) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # the trainer is dead, and what it asked for is done


if __name__ == "__main__":
    main()
