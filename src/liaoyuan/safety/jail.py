"""Run code in the jail: order one, hand it the job, read what comes out, within bounds.

Whatever comes out of a jail is the word of a stranger: `printable` makes a line of it that can be shown.
"""

import contextlib
import json
import os
import platform
import selectors
import signal
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from liaoyuan.errors import LiaoyuanError
from liaoyuan.safety.interpreter import interpreter
from liaoyuan.safety.seccomp import MACHINES, filter_program
from liaoyuan.safety.warden import order

End = Literal["ended", "killed", "time", "cpu", "output", "stopped"]
GRACE_SECONDS = 30.0  # beyond the limit, until a launcher that does not answer is given up
PART = 1 << 16
BLOCK = 4096  # bytes that a file takes beside its own
LONGEST_REASON = 200  # characters


class RefusedError(LiaoyuanError):
    """This host gives no jail: the mechanism that lacks, and why. Nothing has run."""

    def __init__(self, mechanism: str, why: str, remedy: str = "`liaoyuan doctor` says what to do") -> None:
        super().__init__(f"Untrusted code is not run: the jail lacks its part '{mechanism}' here ({why}). {remedy}.")
        self.mechanism, self.why = mechanism, why


@dataclass(frozen=True)
class Limits:
    """What code in a jail may use. Times in seconds; with several processes each has the memory and the CPU time.

    file_bytes: all that it writes to its folder, in at most `files` files and folders.
    """

    seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    files: int = 256
    processes: int = 1
    threads: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name != "threads"):
                raise LiaoyuanError(f"The limit {name} of a jail must be above nought, not {value}.")


@dataclass(frozen=True)
class Outcome:
    """How code ended. exit_code is that of Python (1: an exception), or minus the signal that killed it.

    status: "ended" by itself; "killed" by a signal; at the limit of "time", "cpu" or "output"; or "stopped", because
    what it worked with had ended. output and errors: what
    it wrote. seconds: from the order to the end, the making of the jail included; memory_bytes: the most it had.
    """

    status: End
    exit_code: int | None
    output: bytes
    errors: bytes
    seconds: float
    cpu_seconds: float
    memory_bytes: int

    @property
    def is_well(self) -> bool:
        return self.status == "ended" and self.exit_code == 0


@dataclass(frozen=True)
class Job:
    """A Python program, the files it finds beside it in its folder, and its limits.

    channel: two descriptors, to read from and to write to, which it gets as 3 and 4.
    """

    source: str | bytes
    files: Mapping[str, bytes] = field(default_factory=dict)
    limits: Limits = Limits()
    channel: tuple[int, ...] = ()


@dataclass
class Jail:
    """A jail that has been ordered, and what has come out of it so far, by descriptor: its status, output, errors.

    hold: while it is open somebody cares; the launcher ends the jail when it is closed.
    """

    job: Job
    hold: int
    start: float
    read: dict[int, bytearray]
    flooded: bool = False

    @property
    def status(self) -> int:
        return next(iter(self.read))

    @property
    def written(self) -> int:
        """Bytes of output and errors."""
        return sum(len(content) for number, content in self.read.items() if number != self.status)

    def stop(self) -> None:
        if self.hold >= 0:
            os.close(self.hold)
            self.hold = -1


def start(job: Job) -> Jail:
    """Order a jail; `finish` waits for it. Raises LiaoyuanError for names of files that lead out of its folder."""
    header, contents = encode(job)
    ends = [os.pipe() for _ in range(4)]  # the job, output, errors, the status: each (to read from, to write to)
    theirs = [ends[0][0], *(end[1] for end in ends[1:])]
    ours = [ends[0][1], *(end[0] for end in ends[1:])]
    try:
        order([*theirs, *job.channel])
    except BaseException:
        for descriptor in ours:
            os.close(descriptor)
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    jail = Jail(job, ours[0], time.monotonic(), {number: bytearray() for number in (ours[3], ours[1], ours[2])})
    with contextlib.suppress(BrokenPipeError):  # it has ended, and its last word says why
        for content in (struct.pack(">I", len(header)) + header, *contents):
            write_all(jail.hold, content)
    return jail


def write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def encode(job: Job) -> tuple[bytes, list[bytes]]:
    """Return the header of a job and the contents of its files, in the order in which they are sent."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in MACHINES:
        raise RefusedError("linux", f"this is {platform.system()} on {machine}, not Linux on {' or '.join(MACHINES)}")
    source = job.source.encode() if isinstance(job.source, str) else job.source
    files = {**{checked_name(name): content for name, content in job.files.items()}, "main.py": source}
    size = sum(len(content) + BLOCK for content in files.values())
    if size > job.limits.file_bytes or len(files) > job.limits.files:
        raise LiaoyuanError(
            f"{len(files)} files of {size:,} bytes do not fit in a jail of {job.limits.files} files and "
            f"{job.limits.file_bytes:,} bytes: give it a higher limit."
        )
    paths = interpreter()
    header = {
        "main": "main.py",
        "files": [[name, len(content)] for name, content in files.items()],
        "limits": asdict(job.limits),
        "binds": paths.binds,
        "hidden": [path for path in paths.hidden if Path(path).is_dir()],
        "filter": filter_program(machine, job.limits.processes).hex(),
    }
    return json.dumps(header).encode(), list(files.values())


def checked_name(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or name == "main.py":
        raise LiaoyuanError(
            f"{name!r} is no name for a file in a jail: give a relative path without '..', not main.py."
        )
    return str(path)


def finish(jails: Sequence[Jail]) -> list[Outcome]:
    """Wait for jails that work together. When the first ends, the others are ended too: it is the one that judges."""
    with selectors.DefaultSelector() as selector:
        for jail in jails:
            for number in jail.read:
                selector.register(number, selectors.EVENT_READ, jail)
        try:
            read_until_closed(selector, jails)
        finally:
            for jail in jails:
                jail.stop()
                for number in jail.read:
                    os.close(number)
    return [outcome(jail) for jail in jails]


def read_until_closed(selector: selectors.BaseSelector, jails: Sequence[Jail]) -> None:
    deadline = max(jail.start + jail.job.limits.seconds for jail in jails) + GRACE_SECONDS
    while selector.get_map():
        for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
            jail, number = key.data, key.fd
            part = os.read(number, PART)
            if not part:
                selector.unregister(number)
                if number == jail.status and jail is jails[0]:
                    for other in jails[1:]:
                        other.stop()
            elif number != jail.status and jail.written + len(part) > jail.job.limits.output_bytes:
                jail.flooded = True  # read on, so that it can end, and forget
                jail.stop()
            else:
                jail.read[number] += part
        if time.monotonic() >= deadline:
            return


def outcome(jail: Jail) -> Outcome:
    """Return how it ended, by the launcher's word; raises RefusedError where it refused, or died without a word."""
    report, output, errors = (bytes(content) for content in jail.read.values())
    word: dict[str, object] = {}
    for line in report.splitlines():
        word |= json.loads(line)
    if "refused" in word:
        raise RefusedError(str(word["refused"]), str(word["why"]))
    if not word.get("started") and word.get("end") != "stopped":
        raise RefusedError("jail", f"its launcher ended before the code began: {last_line(errors) or 'without a word'}")
    code, cpu = word.get("code"), float(str(word["cpu"]))
    end: End = "time"
    if jail.flooded:
        end = "output"
    elif isinstance(code, int):
        spent = code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= 0.5 * jail.job.limits.cpu_seconds)
        end = "ended" if code >= 0 else "cpu" if spent else "killed"
    elif word["end"] != "time":
        end = "stopped"
    memory = word.get("memory", 0)
    seconds = time.monotonic() - jail.start
    return Outcome(
        end,
        code if isinstance(code, int) else None,
        output,
        errors,
        seconds,
        cpu,
        memory if isinstance(memory, int) else 0,
    )


def printable(text: str | bytes, longest: int = LONGEST_REASON) -> str:
    """Return a stranger's text as one line of visible characters: no escape sequences, no control characters."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    line = " ".join(text[: 4 * longest].split())
    shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def last_line(text: bytes) -> str:
    """Return the last line that says something: of a traceback, the exception."""
    lines: Iterable[bytes] = (line for line in reversed(text[-4 * PART :].splitlines()) if line.strip())
    return printable(next(iter(lines), b""))
