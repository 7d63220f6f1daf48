"""Calls in forked processes, a few at a time: dry runs make process groups, and a second core should not be idle."""

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from liaoyuan.errors import LiaoyuanError

log = logging.getLogger(__name__)

Given = TypeVar("Given")
Found = TypeVar("Found")


def together(
    function: Callable[[Given], Found], given: Iterable[Given], workers: int = 2
) -> Iterator[tuple[int, Found | LiaoyuanError]]:
    """Yield the number of each input and `function` of it, or what went wrong with it, as they come.

    An input is asked for when a process is free for it.

    Each call has a process of its own, in a group of its own, with which all that it starts ends. With no workers this
    process makes the calls itself, one after the other.
    """
    if not workers:
        yield from ((number, _here(function, one)) for number, one in enumerate(given))
        return
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[int, Any]] = {}
    todo = iter(enumerate(given))
    try:
        while True:
            while len(running) < workers and (following := next(todo, None)):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(theirs, function, following[1]))
                process.start()
                theirs.close()
                running[ours] = following[0], process
            if not running:
                return
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                number, process = running.pop(connection)
                yield number, _answer(connection, process)
    finally:
        for _, process in running.values():
            _end(process)


def _here(function: Callable[[Given], Found], given: Given) -> Found | LiaoyuanError:
    try:
        return function(given)
    except LiaoyuanError as error:
        return error


def _answer(connection: Connection, process: Any) -> Any:
    try:
        kind, found = connection.recv()
    except EOFError:
        process.join()
        return LiaoyuanError(f"its process has died (exit code {process.exitcode}): most likely memory is lacking")
    finally:
        _end(process)
    if kind == "failed":
        log.warning("A prediction has failed:\n%s", found)
        return LiaoyuanError(f"it could not be predicted ({found.strip().splitlines()[-1]})")
    return LiaoyuanError(found) if kind == "refused" else found


def _end(process: Any) -> None:
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            end()
        except (ProcessLookupError, PermissionError):
            continue
    process.join()


def _run(connection: Connection, function: Callable[[Any], Any], given: Any) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    try:
        connection.send(("done", function(given)))
    except LiaoyuanError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
