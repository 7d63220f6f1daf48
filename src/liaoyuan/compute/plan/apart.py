"""A call in a process of its own: PyTorch remembers process groups, and a dry run makes new ones."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from liaoyuan.errors import LiaoyuanError

Found = TypeVar("Found")


def apart(function: Callable[..., Found], *arguments: Any) -> Found:
    """Return `function(*arguments)`, computed by a forked process.

    Raises:
        LiaoyuanError: as the function does. RuntimeError: with the text of any other failure.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        kind, found = ours.recv()
    except EOFError:
        kind, found = "failed", "the process that ran dry has died"
    finally:
        process.join()
    if kind == "refused":
        raise LiaoyuanError(found)
    if kind == "failed":
        raise RuntimeError(found)
    value: Found = found
    return value


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        connection.send(("done", function(*arguments)))
    except LiaoyuanError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
