"""A run is a folder. Whatever is written in it is whole or absent, and a killed command goes on from it.

`write_atomic` and `atomic_folder` write under a temporary name, fsync and rename. `Metrics` is a JSON-lines
file that a resumed run cuts back to the step it resumes from, so that no step is in it twice.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liaoyuan.errors import LiaoyuanError


@dataclass(frozen=True)
class Progress:
    """How far a long work is: `done` of `total` units ("step", "MB"), and what to say beside the bar."""

    done: int
    total: int
    unit: str = "step"
    text: str = ""


Report = Callable[[Progress], None]  # what a room calls to say how far it is; the command line draws it


def silent(progress: Progress) -> None:
    """Report nothing: the default of rooms called from Python."""


TEMPORARY = ".part-"  # what starts so is a torn write of a killed process and may be deleted
OLD = TEMPORARY + "old-"  # before a folder's name: the folder that a new one is just taking the place of


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one.

    Raises:
        LiaoyuanError: the disk is full or the folder cannot be written.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
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
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY))
        temporary.chmod(0o777 & ~_umask())
    try:
        with _disk_errors(path):
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
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LiaoyuanError(f"The disk is full: {path} was not written. Free some space and run again.") from error
        if error.errno in UNWRITABLE:
            raise LiaoyuanError(f"{path} cannot be written: {error.strerror}.") from error
        raise


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
