"""Prefill and decode in different processes, so that long prompts do not hold up those who get their tokens.

A decode worker that gets a request lets a prefill worker compute the prompt, takes over finished blocks of keys and
values while the rest is still computed, and puts them into its own prefix cache, where the request then finds them, as
after any earlier prompt. Whatever goes wrong on the way costs time and nothing else: only whole blocks are used
(`Prefixes.put`), and what did not come the decode worker computes itself, with the same bits. The prefill worker holds
blocks until they are acknowledged, or the decode worker is gone or silent (`lease.Leases`). DistServe: Zhong et al.
2024 (arXiv 2401.09670).

Workers are alike; who asks decides what they do (`dispatch.Dispatch`). Sockets are Unix sockets in a folder of the
user's.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.blocks import Key
from liaoyuan.inference.constraints.specification import Constraints
from liaoyuan.inference.disaggregation.frames import (
    Closed,
    Header,
    connect,
    error_to_json,
    event_to_frame,
    put_frame,
    read_frame,
    request_from_json,
    request_to_json,
    write_frame,
)
from liaoyuan.inference.disaggregation.prefixes import Lot, Prefixes, Torn
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.operations import Pause, operation_from_json
from liaoyuan.inference.request import Event, Request, SamplingParams
from liaoyuan.inference.runner import Busy, EngineThread, Refused

LOT = 32  # blocks sent at once
BACKLOG = 4096  # connections that may wait until they are looked at; many requests may come at once
LOOK = 0.002  # seconds between two looks for new blocks while nothing is computed

Result = TypeVar("Result")


class Aborted(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """All requests are ended, this one too."""


class Worker:
    """One engine that computes prompts for others, and answers requests whose prompts others compute."""

    def __init__(
        self, engine: Engine, runner: EngineThread, lease_seconds: float = 10.0, constraints: Constraints | None = None
    ) -> None:
        """lease_seconds: how long another worker may be silent until it counts as dead.

        constraints: builds those of requests; without it they are refused.
        """
        self._runner, self._patience, self._constraints = runner, lease_seconds, constraints
        self._prefixes = Prefixes(engine, lease_seconds)
        self._names = itertools.count()
        self._talks: dict[str, asyncio.Task[Any]] = {}
        self._coming: dict[Key, asyncio.Event] = {}  # the last block of each prompt that is being taken over
        self._aborting = asyncio.Event()  # of those whose prompts are being taken over
        self.counts = {"blocks_sent": 0, "blocks_received": 0, "blocks_missing": 0, "leases_expired": 0}

    @property
    def busy(self) -> bool:
        """Whether anybody is being served, or blocks are lent."""
        return bool(self._talks) or len(self._prefixes.leases) > 0

    async def prepare(self) -> None:
        """Do before anybody asks what would else be done when the first prompt is handed over."""
        await self._call(self._prefixes.renew)

    @contextlib.asynccontextmanager
    async def listen(self, path: Path) -> AsyncIterator[None]:
        """Serve whoever comes to the Unix socket `path` while the block lasts."""
        server = await asyncio.start_unix_server(self._talk, path, backlog=BACKLOG)
        expiry = asyncio.create_task(self._expire())
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)
            await _cancel(expiry, *self._talks.values())

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = f"hand-over {next(self._names)}"
        self._talks[name] = asyncio.current_task()  # type: ignore[assignment]
        try:
            await self._do(name, (await read_frame(reader))[0], reader, writer)
        except Closed:
            pass
        except (LiaoyuanError, KeyError, TypeError, ValueError) as error:
            put_frame(writer, error_to_json(error))
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), self._patience)
        except asyncio.CancelledError:
            pass  # the lease is over, or the worker ends
        finally:
            del self._talks[name]
            writer.close()

    async def _do(self, name: str, header: Header, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match header.get("do"):
            case "prefill":
                await self._lend(name, header, reader, writer)
            case "generate":
                await _beside(self._answer(name, header, writer), _until_closed(reader))
            case "operate":
                await _beside(self._operate(header, writer), _until_closed(reader))
            case "tell":
                await write_frame(writer, self._tell())
            case other:
                raise LiaoyuanError(f"'{other}' is nothing that a worker does.")

    def _tell(self) -> Header:
        return {**self._runner.health(), **self.counts, "leases": len(self._prefixes.leases)}

    async def _operate(self, header: Header, writer: asyncio.StreamWriter) -> None:
        operation = operation_from_json(header)
        if operation == Pause("abort"):
            self._aborting.set()
            self._aborting = asyncio.Event()
        result = await self._runner.do(operation)
        if operation.decides == "weights":
            await self._call(self._prefixes.renew)
        await write_frame(writer, {"result": result})

    async def _answer(self, name: str, header: Header, writer: asyncio.StreamWriter) -> None:
        """Generate, with what the worker at `header["prefill"]` computes of the prompt."""
        begin, prefill = time.monotonic(), header.get("prefill")
        await write_frame(writer, {"begun": True})  # from now on it may be this request that ends this process
        try:
            asked = await asyncio.to_thread(request_from_json, header["request"], self._constraints)
            request = dataclasses.replace(asked, id=name)
            await self._call(lambda: self._prefixes.adapter(request))
        except LiaoyuanError as error:
            raise Refused(str(error)) from error
        missing = cached = 0
        try:
            if prefill:
                borrowed = self._borrow(request, Path(prefill))
                missing, cached = await _beside(borrowed, _until_set(self._aborting))
        except Aborted:
            await write_frame(writer, *event_to_frame(Event(name, [], [], "abort")))
            return
        if request.timeout is not None:
            request = dataclasses.replace(request, timeout=max(0.0, request.timeout - (time.monotonic() - begin)))
        self.counts["blocks_missing"] += missing
        await write_frame(writer, {"missing": missing})
        try:
            stream = self._runner.stream(request)
        except Busy:
            raise
        except LiaoyuanError as error:
            raise Refused(str(error)) from error
        try:
            async for event in stream:
                if prefill and event.cached_tokens:  # what was computed for this very request was in no cache
                    event = dataclasses.replace(event, cached_tokens=min(cached, event.cached_tokens))
                await write_frame(writer, *event_to_frame(event))
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def _borrow(self, request: Request, path: Path) -> tuple[int, int]:
        """Take over the blocks of a prompt from a prefill worker; return how many are missing, whatever the reason, and
        how many tokens of the prompt were in the cache of either side before.
        """
        keys = await self._call(lambda: self._prefixes.keys(request))
        if not keys:
            return 0, 0
        if keys[-1] in self._coming:  # for another choice of the same request, say
            await self._coming[keys[-1]].wait()
            return await self._borrow_first(request, path, keys)
        came = self._coming[keys[-1]] = asyncio.Event()
        try:
            return await self._borrow_first(request, path, keys)
        finally:
            came.set()
            del self._coming[keys[-1]]

    async def _borrow_first(self, request: Request, path: Path, keys: list[Key]) -> tuple[int, int]:
        """See `_borrow`; keys: of the blocks that are wanted."""
        known = got = await self._call(lambda: self._prefixes.known(keys))
        if got < len(keys):
            known = await self._take_over(request, path, keys, got)
        missing = len(keys) - await self._call(lambda: self._prefixes.known(keys))
        return missing, known * self._prefixes.block_size

    async def _take_over(self, request: Request, path: Path, keys: list[Key], got: int) -> int:
        """Take over the blocks from the place `got` on, as many as come; return how many one of the sides knew."""
        known = got
        plain = dataclasses.replace(request, sampling=SamplingParams())  # how to go on is nothing to the other side
        adapter = await self._call(lambda: self._prefixes.adapter(request))
        asked = {"do": "prefill", "request": request_to_json(plain), "first": got, "adapter": adapter}
        with contextlib.suppress(LiaoyuanError, OSError, TimeoutError):
            reader, writer = await connect(path)
            try:
                put_frame(writer, asked)
                async with asyncio.timeout(request.timeout):
                    known = await _beside(self._receive(keys, got, reader, writer), self._pulse(writer))
            finally:
                writer.close()
        return known

    async def _receive(
        self, keys: list[Key], got: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> int:
        """Put blocks where they are found as they come, until there are no more, or no room for them; return how many
        of the prompt's first ones need not have been computed for it.
        """
        known = got
        while got < len(keys):
            header, data = await asyncio.wait_for(read_frame(reader), self._patience)
            if "error" in header or "end" in header:
                break
            known = max(known, header.get("known", 0))
            if "of" in header:
                lot = _lot(header, data)
                if not await self._call(lambda lot=lot, first=got: self._prefixes.put(lot, keys, first)):  # type: ignore[misc]
                    break
                got += len(lot.keys)
                self.counts["blocks_received"] += len(lot.keys)
                put_frame(writer, {"got": got})
        return known

    async def _lend(
        self, name: str, header: Header, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Compute a prompt and send its blocks from `header["first"]` on to one who says how many it has."""
        asked, first = request_from_json(header["request"]), int(header["first"])
        if await self._call(lambda: self._prefixes.adapter(asked)) != header.get("adapter", ""):
            raise LiaoyuanError(f"The adapter '{asked.adapter}' is another one here.")
        request = dataclasses.replace(asked, id=name, sampling=SamplingParams(max_tokens=1, temperature=0.0))
        await self._call(lambda: self._prefixes.grant(name, first))
        try:
            hear = self._hear(name, reader)
            await _beside(self._send(name, request, first, writer), hear, self._pulse(writer))
        finally:
            await asyncio.shield(self._call(lambda: self._prefixes.leases.end(name)))

    async def _send(self, name: str, request: Request, sent: int, writer: asyncio.StreamWriter) -> None:
        keys = await self._call(lambda: self._prefixes.keys(request))
        put_frame(writer, {"known": await self._call(lambda: self._prefixes.known(keys))})
        computing = asyncio.create_task(_to_the_end(self._runner.stream(request)))
        try:
            while sent < len(keys):
                done = computing.done()
                lot = await self._call(lambda first=sent: self._prefixes.lend(name, keys, first, LOT))  # type: ignore[misc]
                if lot is not None:
                    await write_frame(writer, _header(lot), lot.data)
                    sent += len(lot.keys)
                    self.counts["blocks_sent"] += len(lot.keys)
                elif done:
                    computing.result()
                    break  # the rest was needed for others before it could be held
                else:
                    await asyncio.wait([computing], timeout=LOOK)
            await write_frame(writer, {"end": sent})
            await asyncio.Event().wait()  # until the reader has all, and closes
        finally:
            await _cancel(computing)

    async def _hear(self, name: str, reader: asyncio.StreamReader) -> None:
        """Take what the reader of a lease acknowledges, until it closes."""
        while True:
            header, _ = await read_frame(reader)
            await self._call(lambda got=header.get("got"): self._prefixes.hear(name, got))  # type: ignore[misc]

    async def _pulse(self, writer: asyncio.StreamWriter) -> None:
        """Show that this side lives."""
        while True:
            await asyncio.sleep(self._patience / 4)
            put_frame(writer, {})

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._patience / 4)
            for name in await self._call(lambda: self._prefixes.leases.expire(time.monotonic())):
                self.counts["leases_expired"] += 1
                if name in self._talks:
                    self._talks[name].cancel()

    async def _call(self, work: Callable[[], Result]) -> Result:
        return await self._runner.call(lambda _: work())


def _header(lot: Lot) -> Header:
    keys = [key.hex() for key in lot.keys]
    return {"of": lot.of, "keys": keys, "checksums": list(lot.checksums)}


def _lot(header: Header, data: bytes) -> Lot:
    try:
        keys = tuple(bytes.fromhex(key) for key in header["keys"])
        return Lot(header["of"], keys, tuple(header["checksums"]), data)
    except (KeyError, TypeError, ValueError) as error:
        raise Torn(f"These are no blocks: {error}.") from error


async def _to_the_end(stream: AsyncIterator[Event]) -> None:
    async for _ in stream:
        pass


async def _until_closed(reader: asyncio.StreamReader) -> None:
    """Raise Closed when the other side is gone."""
    while True:
        await read_frame(reader)


async def _until_set(aborted: asyncio.Event) -> None:
    """Raise Aborted when it is set."""
    await aborted.wait()
    raise Aborted("All requests were ended.")


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    """End tasks, and wait until they have."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _beside(work: Awaitable[Result], *others: Awaitable[None]) -> Result:
    """Return what `work` returns, or raise what one of the others raises before (by themselves they never end)."""
    tasks = [asyncio.ensure_future(one) for one in (work, *others)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[1:]:
            if task.done():
                task.result()
        return tasks[0].result()  # type: ignore[return-value]
    finally:
        await _cancel(*tasks)
