"""A folder that is read and nothing else: what is in it is named part by part, and no link leads out of it.

Every part of a path is opened below the one before it and without following links, so neither `..` nor a link that
somebody puts there while it is read can name a file elsewhere.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from liaoyuan.errors import LiaoyuanError

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would else wait for its writer
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG, errno.ESTALE, errno.ENXIO)


class Absent(LiaoyuanError):  # noqa: N818  (no defect: it was removed, or never there)
    """There is no such plain file or folder, or it may not be read."""


@dataclass(frozen=True)
class Folder:
    """`root` and, below it, the folder that `parts` name; `root` itself may be a link."""

    root: Path
    parts: tuple[str, ...] = ()

    def below(self, *parts: str) -> "Folder":
        """Return the folder of that name in this one; whether it is there shows when it is read."""
        return Folder(self.root, (*self.parts, *parts))

    @property
    def path(self) -> Path:
        return self.root.joinpath(*self.parts)

    @contextmanager
    def open(self, *parts: str) -> Iterator[BinaryIO]:
        """Open a plain file for reading. Raises Absent if there is none."""
        with self._held(parts[:-1]) as folder:
            handle = self._at(parts[-1], FILE, folder)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Absent(f"{self.path.joinpath(*parts)} is not a plain file.")
            yield file

    def entries(self) -> list[tuple[str, bool]]:
        """Return (name, whether it is a folder) of what is here, sorted; links are left out. Raises Absent."""
        with self._held(()) as folder, os.scandir(folder) as found:
            plain = [(each.name, each.is_dir(follow_symlinks=False)) for each in found if not each.is_symlink()]
        return sorted(plain)

    def names(self) -> list[str]:
        """Return the sorted names of what is here; none if the folder is not there."""
        try:
            return [name for name, _ in self.entries()]
        except Absent:
            return []

    def status(self, *parts: str) -> os.stat_result | None:
        """Return size and times of a plain file, or None."""
        try:
            with self.open(*parts) as file:
                return os.fstat(file.fileno())
        except Absent:
            return None

    def read(self, *parts: str, most: int) -> str:
        """Return the first `most` bytes of a file as text; empty if there is none."""
        try:
            with self.open(*parts) as file:
                return file.read(most).decode("utf-8", "replace")
        except Absent:
            return ""

    @contextmanager
    def _held(self, further: tuple[str, ...]) -> Iterator[int]:
        """Yield a handle of the folder `further` below this one."""
        handle = self._at(str(self.root), FOLDER, None)
        try:
            for part in (*self.parts, *further):
                inner = self._at(part, FOLDER | os.O_NOFOLLOW, handle)
                os.close(handle)
                handle = inner
            yield handle
        finally:
            os.close(handle)

    def _at(self, name: str, flags: int, folder: int | None) -> int:
        if folder is not None and (name in ("", ".", "..") or "/" in name or "\0" in name):
            raise Absent(f"'{name}' names no file in {self.path}.")
        try:
            return os.open(name, flags, dir_fd=folder)
        except (OSError, UnicodeEncodeError) as error:
            if isinstance(error, OSError) and error.errno not in GONE:
                raise
            what = f"folder {name}" if folder is None else f"{name} in {self.path}"
            raise Absent(f"There is no {what} that can be read.") from None
