"""Some of the records of a file, read anew whenever they are gone through: a million of them need 8 MB."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from liaoyuan.data.formats import Examples
from liaoyuan.data.records import Record
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, silent

TOLD_EVERY = 20_000  # records


class FileRecords(Sequence[Record]):
    """The records of a file in any layout whose numbers, counted as `Examples` gives them, are these.

    numbers: int64 [R], ascending. report: hears how far each reading of many of them is.
    """

    def __init__(self, path: Path, numbers: np.ndarray, report: Report = silent) -> None:
        self.path, self.numbers, self.report = path, numbers, report

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Record]:
        """Read the file up to the last of them.

        Raises:
            LiaoyuanError: it cannot be read, or has fewer records than before.
        """
        place = 0
        if not len(self):
            return
        for number, record in enumerate(Examples(self.path)):
            if number == self.numbers[place]:
                yield record
                place += 1
                if place % TOLD_EVERY == 0:
                    self.report(Progress(place, len(self), "record", "read again"))
                if place == len(self):
                    return
        raise LiaoyuanError(f"{self.path} has changed while it was read: run again.")

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "FileRecords": ...
    def __getitem__(self, index: int | slice) -> "Record | FileRecords":
        """Return some of them, or one, for which the file is read up to it."""
        if isinstance(index, slice):
            return FileRecords(self.path, self.numbers[index], self.report)
        return next(iter(FileRecords(self.path, self.numbers[[index]])))

    def at(self, places: np.ndarray) -> "FileRecords":
        """Return those at these places, ascending."""
        return FileRecords(self.path, self.numbers[places], self.report)
