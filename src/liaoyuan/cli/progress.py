"""Progress of long work, drawn on standard error: done, rate and time left.

On a terminal it is a live bar, with a small curve of the loss or the reward; in a log it is one line every few
seconds, so that a log stays readable.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from liaoyuan.rundir import Progress, Report, silent

SIGNS = "▁▂▃▄▅▆▇█"
LOG_EVERY = 5.0  # seconds between two lines where there is no terminal

heartbeat: ContextVar[Report] = ContextVar("heartbeat", default=silent)  # also told: a worker's launcher listens


@contextlib.contextmanager
def bar(title: str, quiet: bool = False) -> Iterator[Report]:
    """Yield a `Report` that draws what it is told under this title, and passes it on to the heartbeat."""
    beat = heartbeat.get()
    with _drawn(title, quiet) as draw:

        def report(progress: Progress) -> None:
            beat(progress)
            draw(progress)

        yield report


@contextlib.contextmanager
def _drawn(title: str, quiet: bool) -> Iterator[Report]:
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _live(title) as report:
            yield report
    else:
        yield _Log(title)


@contextlib.contextmanager
def _live(title: str) -> Iterator[Report]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}"),
    )
    with Bars(*columns, console=Console(stderr=True), transient=False) as bars:
        task = bars.add_task(title, total=None, state="")
        clock, curve, note = _Clock(), SmallCurve(), ""

        def report(progress: Progress) -> None:
            nonlocal note
            note = f"\n{progress.note}" if progress.note else note
            state = f"{curve.after(progress)}  {clock.describe(progress)}".strip() + note
            bars.update(task, total=progress.total, completed=progress.done, state=escape(state))

        yield report


class SmallCurve:
    """A curve of one line, `▁▂▄▇`: a sign for each stretch of the work, the mean of its values between the extremes."""

    def __init__(self, width: int = 16) -> None:
        self._width = width
        self._sums: dict[int, tuple[float, int]] = {}  # of each stretch: sum and number of its values

    def after(self, progress: Progress) -> str:
        """Return the curve with what `progress` adds to it; empty while it has no two signs."""
        if progress.value is not None and math.isfinite(progress.value):
            place = self._width * max(0, progress.done - 1) // max(1, progress.total)
            total, count = self._sums.get(place, (0.0, 0))
            self._sums[place] = total + progress.value, count + 1
        means = [total / count for _, (total, count) in sorted(self._sums.items())]
        if len(means) < 2:
            return ""
        low, high = min(means), max(means)
        scale = (len(SIGNS) - 1) / (high - low) if high > low else 0.0
        return "".join(SIGNS[round((mean - low) * scale)] for mean in means)


class _Log:
    """Writes a line when work begins, every `LOG_EVERY` seconds, and when it is whole."""

    def __init__(self, title: str) -> None:
        self._title, self._clock, self._last = title, _Clock(), 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        for line in progress.note.splitlines():
            print(f"{self._title}: {line}", file=sys.stderr, flush=True)
        if now - self._last < LOG_EVERY and progress.done < progress.total:
            return
        self._last = now
        share = 100 * progress.done // max(1, progress.total)
        print(f"{self._title}: {share:3d}%  {self._clock.describe(progress)}", file=sys.stderr, flush=True)


class _Clock:
    """Rate and time left since the first report of this work (a resumed run starts in the middle)."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._work: tuple[str, int] | None = None  # in what, and of how many: another one is other work

    def describe(self, progress: Progress) -> str:
        now = time.monotonic()
        work = (progress.unit, progress.total)
        if self._start is None or progress.done < self._start[1] or work != self._work:
            self._start, self._work = (now, progress.done), work
        seconds, done = now - self._start[0], progress.done - self._start[1]
        parts = [f"{progress.done:,}/{progress.total:,} {progress.unit}"]
        if seconds > 0 and done > 0:
            rate = done / seconds
            parts.append(f"{rate:,.1f} {progress.unit}/s" if rate < 100 else f"{rate:,.0f} {progress.unit}/s")
            left = (progress.total - progress.done) / rate
            parts.append(f"{clock_time(left)} left" if progress.done < progress.total else f"in {clock_time(seconds)}")
        return "  ".join([*parts, progress.text]).rstrip()


def clock_time(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
