"""`report.html` while a run goes on: written anew every so often, for at most a hundredth of the run's CPU time."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from liaoyuan.cli.progress import bar
from liaoyuan.rundir import Progress, Report

if TYPE_CHECKING:
    from liaoyuan.runs.run import State

SHARE = 0.01  # of the process's CPU time, which the pages of a run may cost
FIRST_SECONDS = 0.8  # that the first page is taken to cost: matplotlib is loaded for it
END_SECONDS = 0.5  # that are kept for the page of the end
MARGIN = 1.25  # by which a page may cost more than the one before
AGAIN_SECONDS = 20.0  # at least between two pages, on the wall's clock: as often as an open page looks


@contextlib.contextmanager
def followed(title: str, folder: Path, quiet: bool = False) -> Iterator[Report]:
    """Yield a `Report` of a run in `folder` that draws its bar and keeps its page up to date."""
    with bar(title, quiet) as drawn, live_report(folder, drawn, quiet) as report:
        yield report


@contextlib.contextmanager
def live_report(folder: Path, report: Report, quiet: bool = False) -> Iterator[Report]:
    """Pass progress on to `report`, and write the page of the run in `folder` now and then and at the end.

    A page that cannot be written ends no run: that is said, and the run goes on without.
    """
    if quiet:
        yield report
        return
    page = LivePage(folder)

    def told(progress: Progress) -> None:
        page.begun = True  # the folder is this run's, and not one that is refused to it
        report(progress)
        if page.is_due():
            page.write("running")

    try:
        yield told
    except BaseException:
        page.write("stopped")
        raise
    page.write("ended")


class LivePage:
    """The page of a run that this process makes, and what it has cost."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start, self._written = time.process_time(), time.monotonic()
        self.spent, self._last = 0.0, FIRST_SECONDS
        self._broken = self.begun = False

    def is_due(self) -> bool:
        """Return whether a further page, which will cost about what the last one did, stays below the share."""
        if self._broken or time.monotonic() - self._written < AGAIN_SECONDS:
            return False
        wanted = self.spent + MARGIN * self._last + END_SECONDS
        return wanted <= SHARE * (time.process_time() - self._start)

    def write(self, state: "State") -> None:
        """Write the page; `state` is said, for the files of a run tell it to other processes only."""
        if not self.begun or self._broken:
            return
        began = time.process_time()
        try:
            write_page(self._folder, state)
        except Exception as error:
            self._broken = True
            print(f"The report of {self._folder} could not be written: {error}", file=sys.stderr)
        self._last = time.process_time() - began
        self.spent += self._last
        self._written = time.monotonic()


def write_page(folder: Path, state: "State | None" = None) -> Path:
    """Write `folder/report.html` from what is in the run folder, and return its path."""
    from liaoyuan.rundir import write_atomic
    from liaoyuan.runs import Folder
    from liaoyuan.runs.page import run_page

    path = folder / "report.html"
    write_atomic(path, run_page({folder.resolve().name: Folder(folder)}, state).html())
    return path
