"""Running the answers of one HTTP request: several at once, stopped as soon as nobody listens.

Leaving a stream early (a stop string, a lost client, a cancelled task) closes the runner's iterator, which frees the
blocks of the request in the engine.
"""

import asyncio
import contextlib
import json
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from fastapi import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Send

from liaoyuan.data.tokenizer import IncrementalDecoder, Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Busy, Constraint, Event, Grammars, Refused, Request, SamplingParams, ThinkMarks
from liaoyuan.inference.constraints.grammar import Grammar
from liaoyuan.inference.runner import Operation, Unavailable
from liaoyuan.serving.adapters import ADAPTER, Shelf
from liaoyuan.serving.call_reader import CallReader
from liaoyuan.serving.caller import CALLER
from liaoyuan.serving.errors import ApiError, ClientGoneError, invalid
from liaoyuan.serving.metrics import Metrics
from liaoyuan.serving.protocol import TruncationSide
from liaoyuan.serving.settings import Settings
from liaoyuan.serving.text import AnswerReader, Piece
from liaoyuan.serving.tools import CallFormat

Result = TypeVar("Result")


class Runner(Protocol):
    """What serves requests: `inference.EngineThread`, `apart.Apart`, or a stand-in."""

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """Return the events of a request; raises Busy or LiaoyuanError at once if it is refused."""
        ...

    async def do(self, operation: Operation) -> Any:
        """Return what an operation of `inference.operations` gives; raises LiaoyuanError if it is refused."""
        ...

    def health(self) -> dict[str, Any]: ...

    def rouse(self) -> None:
        """Note that somebody wants something, though not of the engine."""
        ...


@dataclass(frozen=True)
class Served:
    """The model that an app serves. `context_length`: the most tokens of a prompt and its answer together.

    call_format: how the model writes tool calls; None: it is not known. thinking: whether it thinks before it answers
        a request that does not say. settings: what else it does where requests leave it open.
    """

    runner: Runner
    tokenizer: Tokenizer
    name: str
    context_length: int
    created: int
    stop_token_ids: tuple[int, ...]
    marks: ThinkMarks | None
    grammars: Grammars
    call_format: CallFormat | None = None
    metrics: Metrics = field(default_factory=lambda: Metrics(dict))
    shelf: Shelf = field(default_factory=Shelf)
    thinking: bool = True
    settings: Settings = field(default_factory=Settings)

    def decoder(self, shown: frozenset[int] = frozenset(), continuing: bool = False) -> IncrementalDecoder:
        return IncrementalDecoder(self.tokenizer, shown=shown, continuing=continuing)

    def hold(self, param: str, grammar: Grammar) -> Constraint:
        """Return the constraint of a grammar that a field asks for. Raises ApiError if it cannot be held."""
        try:
            return self.grammars.compile(grammar)
        except LiaoyuanError as error:
            raise invalid(str(error), param, "invalid_grammar") from error

    @property
    def answering(self) -> str:
        """The name of the model or adapter that answers this HTTP request."""
        return ADAPTER.get() or self.name

    def need(self, part: Literal["metrics", "slots"]) -> None:
        """Raise ApiError (501) if the server was started without this part."""
        if not getattr(self.settings, part):
            raise ApiError(501, f"This server was started without /{part}.", code="left_out")

    def is_own(self, name: str | None) -> bool:
        """Return whether a request that says this asks for the model itself: by a name of it, or by none."""
        return name in (None, self.name, *self.settings.aliases)

    def choose_model(self, name: str | None) -> None:
        """Let this HTTP request's answers come from the model or the adapter that it names.

        Raises:
            ApiError: there is no such one (404).
        """
        loaded = [adapter.name for adapter in self.shelf.loaded()]
        if name in loaded and not self.is_own(name):
            ADAPTER.set(name)
        elif not self.is_own(name):
            known = ", ".join(f"'{each}'" for each in (self.name, *loaded))
            message = f"The model '{name}' does not exist; this server has {known}."
            raise ApiError(404, message, "model", "model_not_found")

    def check_model(self, name: str | None) -> None:
        """Raise ApiError if a request asks for another model, or for an adapter, where these do not answer."""
        if not self.is_own(name):
            message = f"The model '{name}' does not exist; this server has '{self.name}'."
            raise ApiError(404, message, "model", "model_not_found")

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Raise ApiError if a token is none of the tokenizer's."""
        size = self.tokenizer.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise invalid(f"The token {wrong} is out of vocabulary: this model has {size} tokens.", param)


@dataclass(frozen=True)
class Job:
    """One answer to be generated.

    marks: None: thoughts are not told apart. calls: makes the reader of its tool calls; None: they are not told apart.
    shown: special tokens whose text is part of the answer, as marks of tool calls are. priority, salt: see `Request`.
    progress: pieces tell how much of the prompt is read, while it is.
    continuing: the answer goes on in the prompt's last text, so a space before its first word is part of it.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...]
    marks: ThinkMarks | None = None
    calls: Callable[[], CallReader] | None = None
    shown: frozenset[int] = frozenset()
    priority: int = 0
    salt: str = ""
    continuing: bool = False
    progress: bool = False
    adapter: str = field(default_factory=ADAPTER.get)

    def request(self) -> Request:
        """Return what the engine is asked, for the caller of this HTTP request."""
        caller = CALLER.get()
        return Request(
            secrets.token_hex(12),  # not the caller's: he may send one twice
            self.prompt,
            self.sampling,
            self.priority,
            caller.key,
            self.salt,
            self.adapter,
            timeout=caller.time_left(),
            progress=self.progress,
        )


def prompt_ids(served: Served, prompt: str | list[int], param: str = "prompt") -> tuple[int, ...]:
    """Return the ids of a text or of ids; a text gets the special tokens that the model wants before it."""
    if isinstance(prompt, str):
        return tuple(served.tokenizer.encode(prompt, add_special_tokens=True))
    served.check_tokens(prompt, param)
    return tuple(prompt)


def truncated(
    prompt: tuple[int, ...], truncation: int | None, most: int, side: TruncationSide = "left"
) -> tuple[int, ...]:
    """Return `truncation` tokens of a prompt (-1: as many as fit, `most`; None: all); `side` is where it loses some."""
    if truncation is None:
        return prompt
    keep = max(most, 1) if truncation < 0 else truncation
    return prompt[:keep] if side == "right" else prompt[max(0, len(prompt) - keep) :]


def start(served: Served, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Piece]]:
    """Run jobs at once; yield (number of the job, piece) as they come.

    Raises:
        ApiError: a request is refused (400) or the queue is full (429); then none goes on.
    """
    return _merged([_pieces(served, job) for job in jobs])


async def first_and_rest(http: HttpRequest, pieces: AsyncIterator[Result]) -> AsyncIterator[Result]:
    """Wait for the first piece, so that a refusal still has its HTTP status; then return all pieces."""
    first = await unless_gone(http, anext(pieces))

    async def all_pieces() -> AsyncIterator[Result]:
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            yield first
            async for item in pieces:
                yield item

    return all_pieces()


async def collect(http: HttpRequest, pieces: AsyncIterator[tuple[int, Piece]], count: int) -> list[list[Piece]]:
    """Return all pieces of each of `count` jobs, unless the client hangs up."""

    async def all_of_them() -> list[list[Piece]]:
        collected: list[list[Piece]] = [[] for _ in range(count)]
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            async for index, piece in pieces:
                collected[index].append(piece)
        return collected

    return await unless_gone(http, all_of_them())


async def unless_gone(http: HttpRequest, work: Awaitable[Result]) -> Result:
    """Await `work`; if the client hangs up before, cancel it and raise ClientGoneError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _pieces(served: Served, job: Job) -> AsyncIterator[Piece]:
    thinking = job.marks is not None and job.marks.left_open(job.prompt)
    calls = job.calls() if job.calls else None
    stop_tokens = job.sampling.stop_token_ids
    decoder = partial(served.decoder, job.shown, job.continuing)
    reader = AnswerReader(decoder, job.stops, stop_tokens, job.marks, thinking, calls)
    async with contextlib.aclosing(engine_events(served, job.request())) as events:
        with served.metrics.watch(len(job.prompt)) as watch:
            async for event in events:
                watch.saw(event)
                if event.finish_reason == "error":
                    message = f"The form that was asked for could not be held to the end. {event.error}"
                    raise invalid(message.rstrip(), code="grammar_failed")  # a schema that nothing fits, say
                piece = reader.read(event)
                if piece.finish_reason:
                    watch.end(piece.finish_reason)
                    if piece.finish_reason == "timeout" and not piece.completion_tokens:
                        raise CALLER.get().too_late()
                yield piece
                if piece.finish_reason:
                    return


async def engine_events(served: Served, request: Request) -> AsyncGenerator[Event]:
    """Yield the events of a request.

    Raises:
        ApiError: the request is refused (400), the queue is full (429), nobody can answer now (503), or the engine
            fails (500).
    """
    try:
        events = served.runner.stream(request)
    except Busy as error:
        raise ApiError(429, str(error), code="server_busy") from error
    except LiaoyuanError as error:
        raise invalid(str(error)) from error
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        try:
            async for event in events:
                yield event
        except Busy as error:
            raise ApiError(429, str(error), code="server_busy") from error
        except Unavailable as error:
            raise ApiError(503, str(error), code="worker_failed") from error
        except Refused as error:
            raise invalid(str(error)) from error
        except LiaoyuanError as error:
            raise ApiError(500, str(error), code="engine_failed") from error


async def asked_of_engine(served: Served, operation: Operation) -> Any:
    """Return what an operation that asks something of the engine gives.

    Raises:
        ApiError: the engine is not ready (503), or time is up (504).
    """
    CALLER.get().time_left()
    served.runner.rouse()
    try:
        return await served.runner.do(operation)
    except LiaoyuanError as error:
        raise ApiError(503, str(error), code="not_ready") from error


async def _merged(streams: list[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield (index, item) of several streams as they come; the first error ends them all."""
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Piece]) -> None:
        try:
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for item in stream:
                    queue.put_nowait((index, item))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events from an iterator that is closed as soon as the client is gone."""

    def __init__(self, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold: OpenAI's -9999 for what is impossible."""
    return logprob if math.isfinite(logprob) else -9999.0


def server_event(value: dict[str, Any]) -> str:
    """Return a value as one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
