"""How many megabytes of a long read or write are done, told to whoever draws the progress."""

from liaoyuan.rundir import Progress, Report

MEGABYTE = 10**6


class Count:
    """Counts bytes and reports when a further megabyte is full, and at the end."""

    def __init__(self, total: int, report: Report) -> None:
        self._total, self._report = total, report
        self._done, self._told = 0, -1

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self._done += nbytes
        done = self._done // MEGABYTE if self._done < self._total else -(-self._total // MEGABYTE)
        if done != self._told:
            self._told = done
            self._report(Progress(done, -(-self._total // MEGABYTE), "MB"))
