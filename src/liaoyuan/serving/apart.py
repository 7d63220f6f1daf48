"""Prefill and decode apart behind one server: the workers' processes, and what an `EngineThread` is to the server.

Each worker is watched as a replica is (`replicas.Replicas`): one that ends, or does not answer, is started again and
brought into the state of the others. A request goes through `Dispatch`; what changes an engine goes to all workers,
and is done in all or in none.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Busy, Event, Loaded, Request
from liaoyuan.inference.disaggregation.dispatch import Dispatch, operate, tell
from liaoyuan.inference.disaggregation.frames import Closed
from liaoyuan.inference.disaggregation.process import Task, worker_command
from liaoyuan.inference.operations import LoadAdapter, State, UnloadAdapter, UpdateWeights, adapters_from_json
from liaoyuan.inference.runner import Operation, Unavailable
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.everywhere import all_or_none
from liaoyuan.serving.replicas import PATIENCE_SECONDS, Replica, Replicas, replica_environment
from liaoyuan.serving.routing import Routes, token_pieces
from liaoyuan.serving.totals import total_health

LONGEST_SOCKET = 100  # bytes of the path of a Unix socket; most systems allow a few more
PROBE_SECONDS = 1.0  # between two questions how a worker is; what `/metrics` says is so old at most
RESTART_SECONDS = 300.0  # that a request waits for a decode worker while none is there


@dataclass(frozen=True)
class Outcome:
    """What a worker gives, or why it refuses."""

    result: Any = None
    refusal: LiaoyuanError | None = None


@dataclass(frozen=True)
class Sides:
    """How many workers compute prompts, how many decode, and the threads of each."""

    prefill: int
    decode: int
    threads: int


class Sockets:
    """The `replicas.Line` to workers: their Unix sockets. said: what each said last of itself."""

    probe_seconds = PROBE_SECONDS

    def __init__(self) -> None:
        self.said: dict[str, dict[str, Any]] = {}

    def send(self, address: str, call: Operation) -> None:
        asyncio.run(operate(Path(address), call))

    def is_well(self, address: str) -> bool:
        try:
            self.said[address] = asyncio.run(asyncio.wait_for(tell(Path(address)), PATIENCE_SECONDS))
        except (LiaoyuanError, OSError, TimeoutError):
            return False
        return bool(self.said[address]["alive"])


class Apart:
    """A `generation.Runner` over workers; used in one event loop. It knows the adapters that are loaded, too."""

    def __init__(self, workers: Replicas, line: Sockets, sides: Sides, task: Task, said: Mapping[str, Any]) -> None:
        """said: of `State`, by a decode worker. task: of the workers, whose `max_queued` is that of all together."""
        self._workers, self._line, self._sides = workers, line, sides
        paths = [Path(name) for name in _sockets(task, sides)]
        self._numbers = {path: number for number, path in enumerate(paths)}
        decode, prefill = paths[sides.prefill :], paths[: sides.prefill]
        self._dispatch = Dispatch(decode, prefill, self._is_ready, RESTART_SECONDS, self._choose)
        self._routes = Routes()
        workers.renewed = self._routes.forget
        self._capacity, self._open, self._born_with = task.max_queued, 0, task.adapters
        self._loaded = adapters_from_json(said["adapters"])
        self._ending = False
        self.room: int = said["room"]

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """See `EngineThread.stream`; Unavailable is raised while the stream is read, ApiError if the server ends."""
        self._refuse()
        return self._stream(request)

    async def _stream(self, request: Request) -> AsyncIterator[Event]:
        self._refuse()  # others may have begun since `stream` was called
        self._open += 1
        try:
            async with contextlib.aclosing(self._dispatch.stream(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        except LiaoyuanError as error:
            if self._ending:  # no worker has failed: they end with the server
                message = "The server is shutting down. Try again in a moment."
                raise ApiError(503, message, code="shutting_down") from error
            raise
        finally:
            self._open -= 1

    async def do(self, operation: Operation) -> Any:
        """Do something in all workers or in none, or ask one of them.

        Raises:
            Unavailable: no decode worker is there. LiaoyuanError: a worker refuses; then nothing has changed.
        """
        if operation.decides:
            result = await asyncio.to_thread(self._change, operation)
            if isinstance(operation, LoadAdapter | UnloadAdapter):
                self._loaded = adapters_from_json(result)
            return result
        result = await self._dispatch.do(operation)
        if isinstance(operation, State):
            result["max_sequences"] *= self._sides.decode
        return result

    def close(self) -> None:
        """Let answers that are open end when their workers do. May be called by any thread."""
        self._ending = True
        self._dispatch.close()

    def rouse(self) -> None:
        """Do nothing: workers do not sleep by themselves."""

    def health(self) -> dict[str, Any]:
        """Return the sum over the decode workers, and what each worker said last."""
        said = [self._line.said.get(replica.url, {}) for replica in self._workers.all]  # nothing by one that starts
        decode = [each for each in said[self._sides.prefill :] if each]
        states = [each["state"] for each in decode] or ["starting"]
        return {
            **total_health(decode),
            "alive": any(said),  # else nothing is left to be saved by waiting
            "open": self._open,
            "error": next((each["error"] for each in said if each.get("error")), ""),
            "state": next((state for state in states if state != "ready"), "ready"),
            "exact": decode[0]["exact"] if decode else "not proven",
            **self._dispatch.counts,
            "workers": [self._worker(*pair) for pair in zip(self._workers.all, said, strict=True)],
        }

    def loaded(self) -> list[Loaded]:
        return self._loaded

    def _worker(self, replica: Replica, said: dict[str, Any]) -> dict[str, Any]:
        side, number = _side(replica.number, self._sides)
        own = {"side": side, "number": number, "ready": bool(said), "pid": replica.pid, "starts": replica.starts}
        return {**own, **said}

    def _choose(self, request: Request, busy: Mapping[Path, int]) -> Path:
        """Return the worker that most likely knows the beginning of a prompt, of those that are not much busier."""
        pieces = token_pieces(request)
        counts = {self._numbers[path]: count for path, count in busy.items()}
        number = self._routes.choose(pieces, counts)
        self._routes.given(pieces, number)
        return next(path for path in busy if self._numbers[path] == number)

    def _is_ready(self, socket: Path) -> bool:
        return any(replica.url == str(socket) for replica in self._workers.all)

    def _refuse(self) -> None:
        if self._open >= self._capacity:
            raise Busy(f"The server is busy: {self._capacity} requests are open. Try again in a moment.")

    def _change(self, operation: Operation) -> Any:
        """Do something in all workers that are ready; those that start later are told."""
        with self._workers.changing:
            outcome = all_or_none(self._workers, partial(_outcome, operation), _is_refusal)
            if outcome is None:
                raise Unavailable("No worker could do it; they are being started. Try again in a moment.")
            if outcome.refusal is not None:
                raise outcome.refusal
            self._keep(operation, outcome.result)
            for worker in self._workers.ready:
                self._line.is_well(worker.url)
            return outcome.result

    def _keep(self, operation: Operation, result: Any) -> None:
        """Keep an operation for workers that start later, in place of the one that decided the same before."""
        state, what, lasts = self._workers.state, operation.decides, operation.lasts
        if isinstance(operation, LoadAdapter | UnloadAdapter):
            what = f"adapter {operation.name}"
            lasts = lasts or operation.name in self._born_with
        if isinstance(operation, LoadAdapter):  # a worker may be born with another one of this name
            operation = replace(operation, in_place=True)
        if isinstance(operation, UpdateWeights):  # whoever reads them later calls them by the same number
            operation = replace(operation, version=result)
        state.pop(what, None)
        if lasts:
            state[what] = operation


@contextlib.contextmanager
def open_apart(task: Task, sides: Sides) -> Iterator[Apart]:
    """Start the workers of both sides, and end them when the block ends.

    task: of each, but for its socket; `max_queued`: requests that may be open in all together.

    Raises:
        LiaoyuanError: a worker could not start.
    """
    with contextlib.ExitStack() as opened:
        folder = tempfile.mkdtemp(prefix="liaoyuan-")  # mode 0700: who may enter it may ask
        opened.callback(shutil.rmtree, folder, ignore_errors=True)
        task = replace(task, socket=folder)
        sockets, line = _sockets(task, sides), Sockets()
        if len(os.fsencode(sockets[-1])) > LONGEST_SOCKET:
            raise LiaoyuanError(
                f"{folder} is too long a path for the workers' sockets: set TMPDIR to a shorter folder."
            )
        workers = Replicas(
            [worker_command(_own(task, socket, number < sides.prefill)) for number, socket in enumerate(sockets)],
            [replica_environment(number, 1, sides.threads) for number in range(len(sockets))],
            line,
            [" worker ".join(map(str, _side(number, sides))).capitalize() for number in range(len(sockets))],
        )
        opened.enter_context(workers)
        for socket in sockets:
            line.is_well(socket)
        said = asyncio.run(operate(Path(sockets[-1]), State()))
        apart = Apart(workers, line, sides, task, said)
        opened.callback(apart.close)  # before the workers end: who has an answer open is told, and waits for no other
        yield apart


def _outcome(operation: Operation, worker: Replica) -> Outcome | None:
    """Return what a worker gives, or why it refuses; None if it is gone."""
    try:
        return Outcome(asyncio.run(operate(Path(worker.url), operation)))
    except (Closed, OSError):
        worker.kill()
        return None
    except LiaoyuanError as error:
        return Outcome(refusal=error)


def _is_refusal(outcome: Outcome) -> bool:
    return outcome.refusal is not None


def _own(task: Task, socket: str, prefills: bool) -> Task:
    """Return one worker's task; who computes prompts has nothing to guess."""
    return replace(task, socket=socket, draft=None if prefills else task.draft)


def _sockets(task: Task, sides: Sides) -> list[str]:
    """Return where the workers listen, those that prefill first; `task.socket`: the folder."""
    return [
        str(Path(task.socket) / "-".join(map(str, _side(number, sides))))
        for number in range(sides.prefill + sides.decode)
    ]


def _side(number: int, sides: Sides) -> tuple[str, int]:
    """Return the side of a worker, and its number there."""
    return ("prefill", number) if number < sides.prefill else ("decode", number - sides.prefill)
