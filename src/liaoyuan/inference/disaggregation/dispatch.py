"""Who asks: sends requests to decode workers, with a prefill worker for each prompt, and outlives the death of any.

A request whose decode worker dies is asked again of another one, or of the one that takes its place. A sample depends
on seed and position alone, so the same tokens come again; those that were told already are compared and left out.
"""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from liaoyuan.inference.disaggregation.frames import (
    Closed,
    Header,
    connect,
    error_from_json,
    event_from_frame,
    put_frame,
    read_frame,
    request_to_json,
)
from liaoyuan.inference.operations import operation_to_json
from liaoyuan.inference.request import Event, Request
from liaoyuan.inference.runner import Busy, Operation, Unavailable

AVOIDED_SECONDS = 5.0  # for which one that failed is asked only if there is no other
LOOK_SECONDS = 0.1  # between two looks for a worker while there is none
MOST_DEATHS = 3  # of workers under one request: it may be what kills them
DIED = "A decode worker died"

# Which of several workers gets a request, by how many each has; `least_busy`, or one who knows what they had before.
Choose = Callable[[Request, Mapping[Path, int]], Path]


def least_busy(request: Request, busy: Mapping[Path, int]) -> Path:
    """Return the worker that has the fewest requests."""
    return min(busy, key=busy.__getitem__)


class Dispatch:
    """Decode and prefill workers by their sockets, as one engine."""

    def __init__(
        self,
        decode: Sequence[Path],
        prefill: Sequence[Path] = (),
        ready: Callable[[Path], bool] = Path.exists,
        patience: float = 0.0,
        choose: Choose = least_busy,
    ) -> None:
        """ready: whether a worker may be asked now. patience: seconds that a request waits while no decode worker is
        there, for one that is started again. choose: among the workers of a side.
        """
        self._decode, self._prefill, self._ready, self._patience = list(decode), list(prefill), ready, patience
        self._choose = choose
        self._open: Counter[Path] = Counter()
        self._failed: dict[Path, float] = {}  # when it did, by time.monotonic()
        self._seeds = itertools.count()
        self._closed = False
        self.counts = {"moved": 0, "given_up": 0}  # requests that went on elsewhere, and that could not

    def close(self) -> None:
        """Let no request wait for a worker any more: none will come. May be called by any thread."""
        self._closed = True

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """Yield the events of a request; leaving the iterator early aborts it.

        Raises:
            Busy: all decode workers are full. Refused: it cannot be answered. Unavailable: no decode worker is left,
                the ones that had it died, or one gave other tokens than the one before it. LiaoyuanError: a worker
                failed.
        """
        if request.sampling.seed is None:  # the next worker must draw the same
            request = replace(request, sampling=replace(request.sampling, seed=next(self._seeds)))
        return self._stream(request)

    async def _stream(self, request: Request) -> AsyncIterator[Event]:
        told: list[int] = []
        tried: set[Path] = set()
        deaths, end = 0, None if request.timeout is None else time.monotonic() + request.timeout
        while True:
            worker = await self._decode_worker(request, tried, end)
            if worker is None:
                yield Event(request.id, [], [], "timeout")
                return
            if end is not None:
                request = replace(request, timeout=max(0.0, end - time.monotonic()))
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
            except Busy:
                if not self._free(request, tried):
                    raise
            except Closed as error:
                deaths += 1
                self._failed[worker] = time.monotonic()
                self.counts["moved" if deaths < MOST_DEATHS else "given_up"] += 1
                if deaths == MOST_DEATHS:
                    raise Unavailable(f"{DIED} with this request in it, {deaths} times: it is given up.") from error
            except OSError:
                self._failed[worker] = time.monotonic()

    async def _decode_worker(self, request: Request, tried: set[Path], end: float | None) -> Path | None:
        """Return a decode worker, if possible one that is not among `tried`; wait for one while there is none. None:
        the request's time is over, at `end`.
        """
        patient = time.monotonic() + self._patience
        while True:
            if self._closed:
                raise Unavailable("The engine is shutting down.")
            if (found := self._free(request, tried)) is not None:
                return found
            now = time.monotonic()
            if end is not None and now >= end:
                return None
            if now >= patient:
                raise Unavailable("No decode worker is left: all died or cannot be reached. Try again in a moment.")
            await asyncio.sleep(LOOK_SECONDS)
            tried.clear()  # in the place of one that died there is another

    def _free(self, request: Request, tried: set[Path]) -> Path | None:
        return self._chosen(request, [path for path in self._decode if path not in tried])

    def _chosen(self, request: Request, workers: Sequence[Path]) -> Path | None:
        """Return who gets a request; one that failed just now only if there is no other."""
        ready, late = [path for path in workers if self._ready(path)], time.monotonic() - AVOIDED_SECONDS
        well = [path for path in ready if self._failed.get(path, late) <= late]
        busy = {path: self._open[path] for path in well or ready}
        return self._choose(request, busy) if busy else None

    async def do(self, operation: Operation) -> Any:
        """Ask one worker something, of the prefill side if there is any: it does not hold up those who get tokens.

        Raises:
            Unavailable: no worker is there. Whatever the operation raises is raised here, as a LiaoyuanError.
        """
        for side in (self._prefill, self._decode):
            for worker in sorted(filter(self._ready, side), key=self._open.__getitem__):
                with contextlib.suppress(Closed, OSError):
                    return await operate(worker, operation)
        raise Unavailable("No worker is left: all died or cannot be reached. Try again in a moment.")

    async def _ask(self, worker: Path, request: Request) -> AsyncGenerator[Event, None]:
        prefill = self._chosen(request, self._prefill)
        used = [path for path in (worker, prefill) if path]
        self._open.update(used)
        try:
            reader, writer = await connect(worker)
            with contextlib.closing(writer):
                where = str(prefill) if prefill else None
                put_frame(writer, {"do": "generate", "request": request_to_json(request), "prefill": where})
                header, data = await _begun(reader)
                while "error" not in header:
                    if prefill in used and "missing" in header:
                        if header["missing"]:
                            self._failed[prefill] = time.monotonic()
                        self._open[prefill] -= 1
                        used.remove(prefill)
                    if "finish_reason" in header:
                        yield event_from_frame(header, data)
                        if header["finish_reason"]:
                            return
                    header, data = await read_frame(reader)
                raise error_from_json(header)
        finally:
            self._open.subtract(used)


async def _begun(reader: asyncio.StreamReader) -> tuple[Header, bytes]:
    """Return the first frame; OSError if there is none: who died before has never had the request."""
    try:
        return await read_frame(reader)
    except Closed as error:
        raise ConnectionResetError(str(error)) from error


async def tell(worker: Path) -> Header:
    """Return what a worker says of itself: `EngineThread.health`, open leases, blocks sent, received and missing.

    Raises:
        LiaoyuanError: it is gone. OSError: it cannot be reached.
    """
    return await _answer(worker, {"do": "tell"})


async def operate(worker: Path, operation: Operation) -> Any:
    """Let a worker do something, and return what comes of it.

    Raises:
        Closed: it has died meanwhile. OSError: it cannot be reached. LiaoyuanError: it refuses.
    """
    return (await _answer(worker, {"do": "operate", **operation_to_json(operation)}))["result"]


async def _answer(worker: Path, header: Header) -> Header:
    reader, writer = await connect(worker)
    with contextlib.closing(writer):
        put_frame(writer, header)
        answer, _ = await read_frame(reader)
    if answer.get("error") and "kind" in answer:
        raise error_from_json(answer)
    return answer


def _untold(event: Event, repeated: list[int]) -> Event:
    """Return what of an event has not been told; `repeated`, what is still to come again, loses what the event has.

    Raises:
        Unavailable: the event has other tokens.
    """
    count, early = min(len(repeated), len(event.tokens)), event.finish_reason in ("timeout", "abort")
    if event.tokens[:count] != repeated[:count] or (event.finish_reason and len(repeated) > count and not early):
        raise Unavailable(f"{DIED}, and the one that took over gave other tokens: ask again.")
    del repeated[:count]
    return replace(
        event,
        tokens=event.tokens[count:],
        logprobs=event.logprobs[count:],
        top_logprobs=event.top_logprobs[count:],
        masks=event.masks[count:],
    )
