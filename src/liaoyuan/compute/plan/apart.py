"""Calls in processes of their own: PyTorch remembers process groups, and a dry run makes new ones."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from liaoyuan.errors import LiaoyuanError

Found = TypeVar("Found")


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
    waiting = list(enumerate(calls))[::-1]
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, arguments = waiting.pop()
                connection, process = _start(function, arguments)
                running[connection] = number, process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                number, process = running[ready]
                found[number] = _answer(ready, process)
                _end(running.pop(ready)[1])
    finally:
        for _, process in running.values():
            _end(process)
    return [found[number] for number in range(len(calls))]


def _start(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _answer(connection: Connection, process: Any) -> Any:
    try:
        kind, found = connection.recv()
    except EOFError:
        process.join()
        raise LiaoyuanError(
            f"The process that ran dry has died (exit code {process.exitcode}): most likely memory is lacking."
        ) from None
    if kind == "refused":
        raise LiaoyuanError(found)
    if kind == "failed":
        raise RuntimeError(found)
    return found


def _end(process: Any) -> None:
    process.kill()
    process.join()


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    try:
        connection.send(("done", function(*arguments)))
    except LiaoyuanError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
