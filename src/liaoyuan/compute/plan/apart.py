"""A call in a process of its own: PyTorch remembers process groups, and a dry run makes new ones."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from liaoyuan.errors import LiaoyuanError

Found = TypeVar("Found")


def apart(function: Callable[..., Found], *arguments: Any) -> Found:
    """Return `function(*arguments)`, computed by a forked process.

    Raises:
        LiaoyuanError: as the function does, or the process has died. RuntimeError: with the text of any other failure.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        kind, found = ours.recv()
    except EOFError:
        process.join()
        raise LiaoyuanError(
            f"The process that ran dry has died (exit code {process.exitcode}): most likely memory is lacking."
        ) from None
    finally:
        process.kill()
        process.join()
    if kind == "refused":
        raise LiaoyuanError(found)
    if kind == "failed":
        raise RuntimeError(found)
    value: Found = found
    return value


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    try:
        connection.send(("done", function(*arguments)))
    except LiaoyuanError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
