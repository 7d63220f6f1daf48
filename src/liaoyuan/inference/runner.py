"""An engine in a thread of its own, for many asynchronous clients.

Only that thread touches the engine; clients leave it commands (add, abort) that it takes up between two steps.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.doze import Doze
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.request import Event, Request, RequestId

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
DRAINING_SECONDS = 0.01  # between two looks at whether all have ended
OVERDUE_SECONDS = 0.1  # how late a paused engine may notice that a request's time is over


class Busy(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """The queue is full: the client may try again later (HTTP 429)."""


class Refused(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """What a request asks for has gone since it was checked, such as an adapter."""


class Unavailable(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """Nobody can answer now: the client may try again later (HTTP 503)."""


class Operation(Protocol):
    """Something that is asked of an engine besides answers; see `inference.operations`.

    decides: what of the engine it decides; "": it only asks. lasts: whether an engine that starts later must be told.
    """

    decides: ClassVar[str]
    lasts: ClassVar[bool]

    async def run(self, runner: "EngineThread") -> Any:
        """Do it, and return what comes of it, in JSON's types."""
        ...


class EngineThread:
    """Runs an engine; used as `with EngineThread(engine) as runner`."""

    def __init__(
        self, engine: Engine, max_queued: int = 256, sleep_after: float | None = None, weights: Path | None = None
    ) -> None:
        """max_queued: how many requests may be open beyond those that the engine runs at once.

        sleep_after: seconds without a request (or `rouse`) after which the engine gives its memory back until the next
            one; None: never. weights: the folder from which it has its weights again then; None: it keeps them.
        """
        self._engine = engine
        self._doze = Doze(engine, sleep_after, weights)
        self._capacity = engine.config.max_sequences + max_queued
        self._clients: dict[RequestId, _Client] = {}
        self._commands: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._failures, self._error = 0, ""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def __enter__(self) -> "EngineThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread after the step it is in; open streams raise LiaoyuanError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """Return the events of a request as they come; leaving the iterator early aborts it before the next step.

        Raises:
            Busy: too many requests are open. LiaoyuanError: the request is refused, or the engine failed.
                What can be seen at once is raised here, before the iterator is returned.
        """
        self._refuse(request)
        return self._stream(request)

    async def call(self, work: Callable[[Engine], Result]) -> Result:
        """Return `work(engine)`, done by the engine's thread between two steps.

        Raises:
            LiaoyuanError: the engine is not running. Whatever `work` raises is raised here.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        if not self._command(lambda: _answer(loop, done, lambda: work(self._engine))):
            raise LiaoyuanError("The engine is not running.")
        return await done

    async def do(self, operation: Operation) -> Any:
        """Return what an operation gives; whatever it raises is raised here."""
        with self._doze.held():  # one that takes several steps finds the engine awake at each
            return await operation.run(self)

    def rouse(self) -> None:
        """Wake the engine if it has gone to sleep by itself, and let it stay awake for a while."""
        self._command(self._wake_up)

    async def pause(self, mode: Literal["abort", "wait", "keep"] = "keep") -> None:
        """Stop computing; see `Engine.pause`. With "wait", return when those that ran have ended."""
        await self.call(lambda engine: engine.pause(mode))
        while await self.call(lambda engine: engine.state) == "draining":
            await asyncio.sleep(DRAINING_SECONDS)

    def health(self) -> dict[str, Any]:
        """Return whether the thread lives, how often the engine failed (and why last), and `Engine.statistics()`."""
        return {
            "alive": self._thread.is_alive(),
            "open": len(self._clients),
            "failures": self._failures,
            **({"error": self._error} if self._error else {}),
            "state": self._engine.state,
            "dozing": self._doze.dozing,
            **self._engine.statistics(),
        }

    async def _stream(self, request: Request) -> AsyncIterator[Event]:
        self._refuse(request)  # others may have begun since `stream` was called
        client = _Client(asyncio.get_running_loop(), asyncio.Queue())
        self._clients[request.id] = client
        ended = False
        try:
            if not self._command(lambda: self._add(request)):
                raise LiaoyuanError("The engine is not running.")
            while not ended:
                item = await client.queue.get()
                ended = isinstance(item, LiaoyuanError) or item.finish_reason is not None
                if isinstance(item, LiaoyuanError):
                    raise item
                yield item
        finally:
            if not ended and not self._command(lambda: self._abort(request.id, client)):
                self._clients.pop(request.id, None)

    def _refuse(self, request: Request) -> None:
        if len(self._clients) >= self._capacity:
            raise Busy(f"The server is busy: {self._capacity} requests are open. Try again in a moment.")
        if request.id in self._clients:
            raise LiaoyuanError(f"There is already a request with the id '{request.id}'.")
        self._engine.check(request)

    def _command(self, command: Callable[[], None]) -> bool:
        """Leave a command for the engine's thread; False if that has ended."""
        with self._wake:
            running = self._thread.is_alive() and not self._closing
            if running:
                self._commands.append(command)
                self._wake.notify()
            return running

    def _loop(self) -> None:
        while True:
            with self._wake:
                # Who is paused computes nothing, but ends those whose time is over.
                timeout = OVERDUE_SECONDS if self._engine.has_work else self._doze.patience()
                self._wake.wait_for(lambda: self._closing or self._commands or self._engine.can_step, timeout)
                if self._closing:
                    break
                commands, self._commands = self._commands, []
            try:
                for command in commands:
                    command()
                self._deliver([(event.id, event) for event in self._engine.step()])
                self._doze.look()
            except Exception as error:  # no request may kill the loop: fail those that are open, and go on
                logger.exception("the engine failed; all open requests are given up")
                self._failures, self._error = self._failures + 1, repr(error)
                own = str(error) if isinstance(error, LiaoyuanError) else f"The engine failed: {error!r}."
                self._give_up(LiaoyuanError(own))
        for command in self._commands:
            command()
        self._give_up(LiaoyuanError("The engine is shutting down."))

    def _add(self, request: Request) -> None:
        try:
            self._doze.end()
            self._engine.add(request)
        except LiaoyuanError as error:
            self._deliver([(request.id, Refused(str(error)))])

    def _wake_up(self) -> None:
        try:
            self._doze.end()
        except LiaoyuanError as error:
            self._error = str(error)  # whoever asks the engine for something is told that it sleeps

    def _abort(self, request_id: RequestId, client: "_Client") -> None:
        if self._clients.get(request_id) is client:
            del self._clients[request_id]
            self._engine.abort(request_id)

    def _deliver(self, items: list[tuple[RequestId, Event | LiaoyuanError]]) -> None:
        """Hand items to their clients, with one wake-up per event loop; who has ended is forgotten."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Client, Event | LiaoyuanError]]] = {}
        for request_id, item in items:
            client = self._clients.get(request_id)
            if client is None:
                continue
            loops.setdefault(client.loop, []).append((client, item))
            if isinstance(item, LiaoyuanError) or item.finish_reason is not None:
                del self._clients[request_id]
        for loop, batch in loops.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:  # the loop has closed, and its clients with it
                self._forget(loop)

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        for request_id, client in list(self._clients.items()):
            if client.loop is loop:
                del self._clients[request_id]
                self._engine.abort(request_id)

    def _give_up(self, error: LiaoyuanError) -> None:
        for request_id in list(self._clients):
            self._engine.abort(request_id)
        self._deliver([(request_id, error) for request_id in list(self._clients)])


@dataclass(frozen=True)
class _Client:
    """Who waits for events, and on which event loop."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Event | LiaoyuanError]"


def _answer(loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Result]", work: Callable[[], Result]) -> None:
    """Do some work and leave what comes of it to whoever waits on `loop`."""

    def settle(set_value: Callable[[Any], None], value: Any) -> None:
        if not done.done():  # cancelled: nobody waits any more
            set_value(value)

    try:
        outcome: tuple[Callable[[Any], None], Any] = (done.set_result, work())
    except Exception as error:
        outcome = (done.set_exception, error)
    with contextlib.suppress(RuntimeError):  # the loop has closed
        loop.call_soon_threadsafe(settle, *outcome)


def _put(batch: list[tuple[_Client, Event | LiaoyuanError]]) -> None:
    for client, item in batch:
        client.queue.put_nowait(item)
