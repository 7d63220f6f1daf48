"""Work that may never end, in processes of its own with a time limit for every call.

A worker is a program that is run as a file, so that it starts fast: it answers each line of JSON on its standard
input with one on its standard output. One that is too slow or dies is ended, and another is started when the next
call comes.
"""

import contextlib
import json
import queue
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liaoyuan.errors import LiaoyuanError

START_SECONDS = 60.0  # of a program that must import much on a busy machine
LONGEST_ANSWER = 2**20  # bytes of a line


@dataclass(frozen=True)
class Reply:
    """What a worker answered; value None: it did not, and why."""

    value: dict[str, Any] | None
    why: str = ""


class Worker:
    """A process that runs `program`; `ask` waits for each answer at most `seconds`."""

    def __init__(self, program: Path, arguments: Sequence[str], seconds: float) -> None:
        self._command = [sys.executable, "-P", str(program), *arguments]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any]) -> Reply:
        process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = _line(process, self._seconds)
        except OSError:
            line = b""
        if not line:
            self.close()
            why = f"it took over {self._seconds:g} s" if line is None else "its process died"
            return Reply(None, why)
        found: dict[str, Any] = json.loads(line)
        return Reply(found)

    def hello(self) -> dict[str, Any]:
        """Start the process if there is none, and return what it said first."""
        if self._process is None:
            self._start()
        return self._said

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
        )
        weakref.finalize(self, _end, process)
        line = _line(process, START_SECONDS)
        if not line:
            _end(process)
            raise LiaoyuanError(f"The program {self._command[2]} does not start, so nothing can be judged by it.")
        self._process, self._said = process, json.loads(line)
        return process


class Workers:
    """Several workers of one kind; `ask_all` shares the questions out among them."""

    def __init__(self, program: Path, arguments: Sequence[str], seconds: float, count: int) -> None:
        self.count = count
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(Worker(program, arguments, seconds))

    def ask(self, question: dict[str, Any]) -> Reply:
        worker = self._idle.get()
        try:
            return worker.ask(question)
        finally:
            self._idle.put(worker)

    def ask_all(self, questions: Sequence[dict[str, Any]]) -> Generator[Reply]:
        """Yield the replies in the order of the questions, as they come; if it is closed, the rest is not asked."""
        if len(questions) < 2 or self.count < 2:
            yield from map(self.ask, questions)
            return
        threads = ThreadPoolExecutor(min(self.count, len(questions)))
        try:
            yield from threads.map(self.ask, questions)
        finally:
            threads.shutdown(cancel_futures=True)

    def hello(self) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            return worker.hello()
        finally:
            self._idle.put(worker)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]


def _line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    """Return the next line that a process writes, b"" if it has died; None if it is not whole in time."""
    assert process.stdout
    waiting = select.poll()  # not `select`, which knows only the first 1,024 files of a process
    waiting.register(process.stdout, select.POLLIN)
    line, end = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        if not waiting.poll(max(0.0, end - time.monotonic()) * 1000):
            return None
        piece = process.stdout.read1(65536)  # type: ignore[attr-defined]
        line += piece
        if not piece or len(line) > LONGEST_ANSWER:
            return b""
    return line
