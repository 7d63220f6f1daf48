"""A run is a folder. Whatever is written in it is whole or absent, and a killed command goes on from it.

`write_atomic` and `atomic_folder` write under a temporary name, fsync and rename. `Metrics` is a JSON-lines
file that a resumed run cuts back to the step it resumes from, so that no step is in it twice. `Lock` keeps two jobs
from writing in one folder.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from liaoyuan.config import Config, to_toml
from liaoyuan.errors import LiaoyuanError


@dataclass(frozen=True)
class Progress:
    """How far a long work is: `done` of `total` units ("step", "MB"), and what to say beside the bar.

    value: the figure that the work is about (a loss, a reward), of which a terminal draws a small curve.
    note: what to say once, whatever else is left out: a warning, say.
    """

    done: int
    total: int
    unit: str = "step"
    text: str = ""
    value: float | None = None
    note: str = ""


Report = Callable[[Progress], None]  # what a room calls to say how far it is; the command line draws it


def silent(progress: Progress) -> None:
    """Report nothing: the default of rooms called from Python."""


CONFIG = "config.toml"  # of a run, as it was resolved
TEMPORARY = ".part-"  # what starts so is a torn write of a killed process and may be deleted
LOCK_PATIENCE = 10.0  # seconds in which a holder that was told to stop, or whose parent died, ends
LOCK_POLL = 0.1
OLD = TEMPORARY + "old-"  # before a folder's name: the folder that a new one is just taking the place of


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one.

    Raises:
        LiaoyuanError: the disk is full or the folder cannot be written.
    """
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `path` when the block ends well, and vanishes when it does not; see `write_atomic`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An older folder at `path` is replaced. Raises LiaoyuanError if the disk is full.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY))
        temporary.chmod(0o777 & ~_umask())
    try:
        with disk_errors(path):
            yield temporary
            for file in temporary.rglob("*"):
                _fsync(file)
            old = path.with_name(OLD + path.name)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)  # killed between these two, `sweep` brings it back
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
            _fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises LiaoyuanError if it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LiaoyuanError(f"The file {path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LiaoyuanError(f"The file {path} is not valid JSON: {error}.") from error


def remember(config: Config, folder: Path, has_begun: bool, free: tuple[str, ...] = ()) -> None:
    """Write the resolved config into a run folder as `config.toml`.

    free: beginnings of keys that may change when a run goes on.

    Raises:
        LiaoyuanError: a run under another config has begun there.
    """
    path, text = folder / CONFIG, to_toml(config)
    if has_begun and path.exists():
        before, now = _flat(_filled(config, path.read_text(encoding="utf-8"))), _flat(tomllib.loads(text))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) and not key.startswith(free):
                raise LiaoyuanError(
                    f"{folder} holds a run with {key} = {before.get(key)}, not {now.get(key)}: "
                    "give the same value to go on with it, or choose another folder."
                )
    write_atomic(path, text)


def _filled(config: Config, text: str) -> dict[str, Any]:
    """Return a run's earlier settings with the defaults of keys that are newer than it."""
    values = tomllib.loads(text)
    try:
        return tomllib.loads(to_toml(type(config).model_validate(values)))
    except ValidationError:  # it has a key that there is no more, which is then named
        return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def sweep(folder: Path) -> None:
    """Delete what a killed process left half written directly in `folder`; an old folder not yet replaced returns."""
    for item in folder.glob(OLD + "*"):
        place = folder / item.name.removeprefix(OLD)
        if not place.exists():
            item.rename(place)
    for item in folder.glob(TEMPORARY + "*"):
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)


class Lock:
    """A folder that one process at a time may write in; the kernel opens the lock when its holder dies, even by -9.

    Locks of the POSIX kind, which a forked child does not inherit, and which network file systems know.
    """

    def __init__(self, folder: Path, name: str = ".lock", patience: float | None = None) -> None:
        self._folder, self._path = folder, folder / name
        self._patience = LOCK_PATIENCE if patience is None else patience
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the lock, and wait a little for a holder that is about to end.

        Raises:
            LiaoyuanError: another process has it; the message names it.
        """
        with disk_errors(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="utf-8")
        end = time.monotonic() + self._patience
        while not self._try():
            if time.monotonic() > end:
                holder = self._holder()
                self.release()
                raise LiaoyuanError(
                    f"{self._folder} is in use by {holder}: stop it, wait for it, or choose another folder."
                )
            _pause()
        self._file.truncate(0)
        self._file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def pass_through(self) -> None:
        """Wait until nobody has the lock."""
        if self._path.exists():
            self.take()
            self.release()

    def release(self) -> None:
        """Let go of the lock, if this process has it."""
        if self._file:
            self._file.close()
            self._file = None

    def _try(self) -> bool:
        assert self._file
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # else: this file system knows no locks
        return True

    def _holder(self) -> str:
        assert self._file
        self._file.seek(0)
        try:
            told = json.loads(self._file.read())
            return f"process {told['process']} on {told['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"


class Metrics:
    """`metrics.jsonl`: one JSON object a step, each with the key `step`."""

    def __init__(self, path: Path, resume_from: int = 0) -> None:
        """Open for appending; rows with `step >= resume_from` (of a run that went further) are cut off."""
        kept = [row for row in read_metrics(path) if row["step"] < resume_from]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Append one row."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a torn last line is ignored, a missing file is empty."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk may refuse into a LiaoyuanError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LiaoyuanError(f"The disk is full: {path} was not written. Free some space and run again.") from error
        if error.errno in UNWRITABLE:
            raise LiaoyuanError(f"{path} cannot be written: {error.strerror}.") from error
        raise


def _pause() -> None:
    time.sleep(LOCK_POLL)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
