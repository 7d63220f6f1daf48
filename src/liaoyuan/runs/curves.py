"""The curves of a run: `metrics.jsonl` as columns of numbers, read on as it grows and never twice."""

import json
import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from liaoyuan.runs.folder import Absent, Folder

METRICS = "metrics.jsonl"
LONGEST_LINE = 2**20  # bytes of a row that is still read
CHUNK = 2**20
MOST_COLUMNS = 400
AXES = {  # what may be a curve's x, and the columns that say it, best first
    "step": ("step",),
    "tokens": ("tokens", "generated_tokens"),
    "cpu_seconds": ("cpu_seconds",),
    "seconds": ("seconds",),
}


@dataclass(frozen=True)
class Curve:
    """Points of one figure of one run, in the order of its steps."""

    x: list[float]
    y: list[float]


class Curves:
    """The columns of a run's metrics; what a row lacks, or what is no number there, is NaN."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._file: tuple[int, int] = (0, 0)  # device and number of the file that was read
        self._place = 0  # up to which it was read
        self.columns: dict[str, array[float]] = {}
        self.rows = 0
        self.changed = 0.0  # when the file last was, as its folder says

    def follow(self) -> "Curves":
        """Read what has been written since; a row that is not whole yet waits. Without a file there are no rows."""
        try:
            with self._folder.open(METRICS) as file:
                self._read_on(file)
        except Absent:
            self._begin((0, 0))
        return self

    def figures(self) -> list[str]:
        """Return the names of the columns that hold numbers, in the order in which they came, without the axes."""
        return [name for name in self.columns if name not in ("step", "tokens", "seconds", "cpu_seconds")]

    def last(self, name: str) -> float | None:
        """Return the newest number of a column."""
        column = self.columns.get(name, ())
        return next((value for value in reversed(column) if math.isfinite(value)), None)

    def axes(self) -> list[str]:
        """Return which of `AXES` this run can be drawn over."""
        return [axis for axis, names in AXES.items() if any(name in self.columns for name in names)]

    def curve(self, name: str, axis: str = "step", most: int = 1500) -> Curve:
        """Return a column over an axis, in at most about `most` points (lowest and highest of each stretch)."""
        named = next((each for each in AXES[axis] if each in self.columns), None)
        if named is None or name not in self.columns:
            return Curve([], [])
        pairs = zip(self.columns[named], self.columns[name], strict=True)
        points = thin([(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)], most)
        return Curve([x for x, _ in points], [y for _, y in points])

    def _begin(self, file: tuple[int, int]) -> None:
        self._file, self._place = file, 0
        self.columns, self.rows = {}, 0

    def _read_on(self, file: BinaryIO) -> None:
        found = os.fstat(file.fileno())
        self.changed = found.st_mtime
        if (found.st_dev, found.st_ino) != self._file or found.st_size < self._place:
            self._begin((found.st_dev, found.st_ino))  # a resumed run wrote its rows anew
        file.seek(self._place)
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n"):
                if len(line) < LONGEST_LINE:
                    return  # torn: its end is still to come
                self._pass_over(file)
                continue
            self._place = file.tell()
            self._add(line)

    def _pass_over(self, file: BinaryIO) -> None:
        while part := file.readline(CHUNK):
            if part.endswith(b"\n"):
                self._place = file.tell()
                return

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            return
        for name, value in _numbers(row):
            if name not in self.columns and len(self.columns) < MOST_COLUMNS:
                self.columns[name] = array("d", [math.nan]) * self.rows
            if name in self.columns:
                self.columns[name].append(value)
        self.rows += 1
        for column in self.columns.values():
            if len(column) < self.rows:
                column.append(math.nan)


def _numbers(row: dict[str, object]) -> list[tuple[str, float]]:
    """Return the numbers of a row by name; those of an object in it have its name before theirs."""
    found: dict[str, float] = {}
    for name, value in row.items():
        inner = value.items() if isinstance(value, dict) else ()
        for key, number in [(name, value), *((f"{name}.{part}", each) for part, each in inner)]:
            if _is_number(number):
                found[key] = _finite(number)
    return list(found.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: object) -> float:
    """Return a number as a float; one that is too large for that is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.nan


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Keep the lowest and the highest point of each of `most / 2` equal stretches, and both ends: spikes stay."""
    if len(points) <= most:
        return list(points)
    size = len(points) / max(1, most // 2)
    kept = {0, len(points) - 1}
    for part in range(max(1, most // 2)):
        places = range(int(part * size), int((part + 1) * size))
        kept |= {min(places, key=lambda place: points[place][1]), max(places, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]
