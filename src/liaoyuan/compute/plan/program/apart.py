"""Calls in forked processes, a few at a time: PyTorch remembers process groups, and a dry run makes new ones."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from liaoyuan.errors import LiaoyuanError

Found = TypeVar("Found")
Calls = Iterable[tuple[Any, ...]]


def apart(function: Callable[..., Found], *arguments: Any) -> Found:
    """Return `function(*arguments)`, computed by a forked process.

    Raises:
        LiaoyuanError: as the function does, or the process has died. RuntimeError: with the text of any other failure.
    """
    (found,) = apart_each(function, [arguments])
    return found


def apart_each(function: Callable[..., Found], calls: Sequence[tuple[Any, ...]], at_once: int = 1) -> list[Found]:
    """Return `function(*arguments)` for each of `calls`, each in a forked process, so many at a time.

    Raises:
        LiaoyuanError, RuntimeError: as `apart` does, for the first call that fails.
    """
    found: dict[int, Found] = {}
    for number, answer in as_they_come(function, calls, at_once):
        if isinstance(answer, Exception):
            raise answer
        found[number] = answer
    return [found[number] for number in range(len(calls))]


def as_they_come(
    function: Callable[..., Found], calls: Calls, at_once: int
) -> Iterator[tuple[int, Found | LiaoyuanError | RuntimeError]]:
    """Yield the number of each call and what came of it, as they end. A call is asked for when a process is free for
    it. With none at once this process makes the calls itself, one after the other.
    """
    if not at_once:
        yield from ((number, _here(function, arguments)) for number, arguments in enumerate(calls))
        return
    running: dict[Connection, tuple[int, Any]] = {}
    waiting = iter(enumerate(calls))
    try:
        while True:
            while len(running) < at_once and (following := next(waiting, None)):
                connection, process = _start(function, following[1])
                running[connection] = following[0], process
            if not running:
                return
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                number, process = running.pop(ready)
                yield number, _answer(ready, process)
    finally:
        for _, process in running.values():
            _end(process)


def _here(function: Callable[..., Found], arguments: tuple[Any, ...]) -> Found | LiaoyuanError:
    try:
        return function(*arguments)
    except LiaoyuanError as error:
        return error


def _start(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    leads = multiprocessing.parent_process() is None  # what it starts in turn belongs to its group
    process = context.Process(target=_run, args=(theirs, leads, function, arguments))
    process.start()
    theirs.close()
    return ours, process


def _answer(connection: Connection, process: Any) -> Any:
    try:
        kind, found = connection.recv()
    except EOFError:
        process.join()
        return LiaoyuanError(
            f"The process that ran dry has died (exit code {process.exitcode}): most likely memory is lacking."
        )
    finally:
        _end(process)
    return {"refused": LiaoyuanError, "failed": RuntimeError}[kind](found) if kind != "done" else found


def _end(process: Any) -> None:
    """End a process with all that it has started (they are of its group, where it leads one)."""
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            end()
        except (ProcessLookupError, PermissionError):
            continue
    process.join()


def _run(connection: Connection, leads: bool, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if leads:
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    try:
        connection.send(("done", function(*arguments)))
    except LiaoyuanError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
