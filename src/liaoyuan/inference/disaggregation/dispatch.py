"""Who asks: sends requests to decode workers, with a prefill worker for each prompt, and outlives the death of any.

A request whose decode worker dies is asked again of another one. A sample depends on seed and position alone, so the
same tokens come again; those that were told already are compared and left out.
"""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

from liaoyuan.checkpoint import load_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.disaggregation.frames import (
    Closed,
    Header,
    event_from_json,
    put_frame,
    read_frame,
    request_to_json,
)
from liaoyuan.inference.disaggregation.worker import Worker
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.request import Event, Request
from liaoyuan.inference.runner import EngineThread
from liaoyuan.inference.sizes import EngineConfig


class Front:
    """Decode and prefill workers by their sockets, as one engine."""

    def __init__(self, decode: Sequence[Path], prefill: Sequence[Path] = ()) -> None:
        self._decode, self._prefill = list(decode), list(prefill)
        self._open: Counter[Path] = Counter()
        self._failures: Counter[Path] = Counter()  # in a row
        self._seeds = itertools.count()

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Yield the events of a request; leaving the iterator early aborts it.

        Raises:
            LiaoyuanError: it is refused, no decode worker is left, or a second one gave other tokens than the first.
        """
        if request.sampling.seed is None:  # the next worker must draw the same
            request = replace(request, sampling=replace(request.sampling, seed=next(self._seeds)))
        told: list[int] = []
        tried: set[Path] = set()
        while True:
            worker = self._least_busy([path for path in self._decode if path not in tried])
            if worker is None:
                raise LiaoyuanError("No decode worker is left: all died or cannot be reached. Start them again.")
            tried.add(worker)
            repeated = told.copy()
            try:
                async with contextlib.aclosing(self._ask(worker, request)) as events:
                    async for event in events:
                        event = _untold(event, repeated)
                        told += event.tokens
                        if event.tokens or event.finish_reason:
                            yield replace(event, id=request.id)
                return
            except (Closed, OSError):
                self._failures[worker] += 1

    async def _ask(self, worker: Path, request: Request) -> AsyncGenerator[Event, None]:
        prefill = self._least_busy(self._prefill)
        used = [path for path in (worker, prefill) if path]
        self._open.update(used)
        try:
            reader, writer = await asyncio.open_unix_connection(worker)
            with contextlib.closing(writer):
                where = str(prefill) if prefill else None
                put_frame(writer, {"do": "generate", "request": request_to_json(request), "prefill": where})
                header, _ = await read_frame(reader)
                if prefill and "missing" in header:
                    self._failures[prefill] = self._failures[prefill] + 1 if header["missing"] else 0
                    self._open[prefill] -= 1
                    used.remove(prefill)
                while "error" not in header:
                    if "finish_reason" in header:
                        yield event_from_json(header)
                        if header["finish_reason"]:
                            self._failures[worker] = 0
                            return
                    header, _ = await read_frame(reader)
                raise LiaoyuanError(str(header["error"]))
        finally:
            self._open.subtract(used)

    def _least_busy(self, workers: list[Path]) -> Path | None:
        return min(workers, key=lambda path: (self._failures[path], self._open[path]), default=None)


async def tell(worker: Path) -> Header:
    """Return what a worker says of itself: `EngineThread.health`, open leases, blocks sent, received and missing.

    Raises:
        LiaoyuanError: it is gone. OSError: it cannot be reached.
    """
    reader, writer = await asyncio.open_unix_connection(worker)
    with contextlib.closing(writer):
        put_frame(writer, {"do": "tell"})
        return (await read_frame(reader))[0]


def _untold(event: Event, repeated: list[int]) -> Event:
    """Return what of an event has not been told; `repeated`, what is still to come again, loses what the event has.

    Raises:
        LiaoyuanError: the event has other tokens.
    """
    count = min(len(repeated), len(event.tokens))
    if event.tokens[:count] != repeated[:count] or (event.finish_reason and len(repeated) > count):
        raise LiaoyuanError("A decode worker died, and the one that took over gave other tokens: ask again.")
    del repeated[:count]
    return replace(
        event,
        tokens=event.tokens[count:],
        logprobs=event.logprobs[count:],
        top_logprobs=event.top_logprobs[count:],
    )


def start_worker(
    folder: Path, socket: Path, config: EngineConfig = EngineConfig(), lease_seconds: float = 10.0
) -> BaseProcess:
    """Start a process that serves a model folder as a `Worker` at a Unix socket; it ends with this one.

    The socket is there when the worker is ready. Whoever may enter the socket's folder may ask: keep it private.
    """
    socket.unlink(missing_ok=True)  # a killed worker leaves its own
    process = get_context("spawn").Process(
        target=_run_worker, args=(folder, socket, config, lease_seconds), name="worker", daemon=True
    )
    process.start()
    return process


def _run_worker(folder: Path, socket: Path, config: EngineConfig, lease_seconds: float) -> None:
    engine = Engine(load_model(folder, further=config.speculate == "mtp").eval(), config)
    with EngineThread(engine) as runner:
        asyncio.run(_serve(Worker(engine, runner, lease_seconds), socket))


async def _serve(worker: Worker, socket: Path) -> None:
    parent = parent_process()
    assert parent is not None
    async with worker.listen(socket):
        await asyncio.to_thread(connection.wait, [parent.sentinel])
