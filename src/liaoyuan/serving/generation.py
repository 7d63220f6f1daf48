"""Running the answers of one HTTP request: several at once, stopped as soon as nobody listens.

Leaving a stream early (a stop string, a lost client, a cancelled task) closes the runner's iterator, which frees the
blocks of the request in the engine.
"""

import asyncio
import contextlib
import json
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from fastapi import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Send

from liaoyuan.data.tokenizer import IncrementalDecoder, Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Busy, Engine, Event, Request, SamplingParams, ThinkMarks
from liaoyuan.serving.adapters import ADAPTER, Shelf
from liaoyuan.serving.errors import ApiError, ClientGoneError, invalid
from liaoyuan.serving.protocol import Sampling
from liaoyuan.serving.scores import PromptScorer
from liaoyuan.serving.text import AnswerReader, Piece

SEEDS = 2**63  # seeds are taken modulo this, so that a negative one is as good as any

Result = TypeVar("Result")


class Runner(Protocol):
    """What serves requests: `inference.EngineThread`, or a stand-in."""

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """Return the events of a request; raises Busy or LiaoyuanError at once if it is refused."""
        ...

    async def call(self, work: Callable[[Engine], Result]) -> Result:
        """Return `work(engine)`, done between two steps of the engine."""
        ...

    async def pause(self, mode: Literal["abort", "wait", "keep"]) -> None:
        """Stop computing; see `inference.EngineThread.pause`."""
        ...

    def health(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Served:
    """The model that an app serves. `context_length`: the most tokens of a prompt and its answer together."""

    runner: Runner
    tokenizer: Tokenizer
    name: str
    context_length: int
    created: int
    stop_token_ids: tuple[int, ...]
    marks: ThinkMarks | None
    scorer: PromptScorer | None = None
    shelf: Shelf = field(default_factory=Shelf)

    def decoder(self) -> IncrementalDecoder:
        return IncrementalDecoder(self.tokenizer)

    @property
    def answering(self) -> str:
        """The name of the model or adapter that answers this HTTP request."""
        return ADAPTER.get() or self.name

    def choose_model(self, name: str | None) -> None:
        """Let this HTTP request's answers come from the model or the adapter that it names.

        Raises:
            ApiError: there is no such one (404).
        """
        loaded = [adapter.name for adapter in self.shelf.loaded()]
        if name in loaded and name != self.name:
            ADAPTER.set(name)
        elif name is not None and name != self.name:
            known = ", ".join(f"'{each}'" for each in (self.name, *loaded))
            message = f"The model '{name}' does not exist; this server has {known}."
            raise ApiError(404, message, "model", "model_not_found")

    def check_model(self, name: str | None) -> None:
        """Raise ApiError if a request asks for another model."""
        if name is not None and name != self.name:
            message = f"The model '{name}' does not exist; this server has '{self.name}'."
            raise ApiError(404, message, "model", "model_not_found")


@dataclass(frozen=True)
class Job:
    """One answer to be generated."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...]
    marks: ThinkMarks | None = None  # None: thoughts are not told apart
    adapter: str = field(default_factory=ADAPTER.get)


def sampling_params(
    served: Served, body: Sampling, prompt: tuple[int, ...], max_tokens: int | None, top_logprobs: int, choice: int
) -> SamplingParams:
    """Return the engine's parameters for choice number `choice` of a request.

    Raises:
        ApiError: prompt and answer do not fit together.
    """
    room = served.context_length - len(prompt)
    if room < (max_tokens or 1):
        wanted = f" and {max_tokens} tokens are asked for" if max_tokens else ""
        raise invalid(
            f"This model's context is {served.context_length} tokens, but the prompt has {len(prompt)}{wanted}. "
            f"Shorten the prompt or max_tokens.",
            "messages" if hasattr(body, "messages") else "prompt",
            "context_length_exceeded",
        )
    ends = () if body.ignore_eos else served.stop_token_ids
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    top_p = 1.0 if body.top_p is None else body.top_p
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        max_tokens=max_tokens or room,
        temperature=temperature if top_p > 0 else 0.0,  # a nucleus of nothing is the most probable token
        top_p=top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=(seed + choice) % SEEDS,
        stop_token_ids=(*ends, *(body.stop_token_ids or ())),
        top_logprobs=top_logprobs,
    )


def start(served: Served, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Piece]]:
    """Run jobs at once; yield (number of the job, piece) as they come.

    Raises:
        ApiError: a request is refused (400) or the queue is full (429); then none goes on.
    """
    return _merged([_pieces(served, job) for job in jobs])


async def first_and_rest(
    http: HttpRequest, pieces: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[tuple[int, Piece]]:
    """Wait for the first piece, so that a refusal still has its HTTP status; then return all pieces."""
    first = await unless_gone(http, anext(pieces))

    async def all_pieces() -> AsyncIterator[tuple[int, Piece]]:
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
    reader = AnswerReader(served.decoder, job.stops, job.sampling.stop_token_ids, job.marks, thinking)
    try:
        events = served.runner.stream(Request(secrets.token_hex(12), job.prompt, job.sampling, adapter=job.adapter))
    except Busy as error:
        raise ApiError(429, str(error), code="server_busy") from error
    except LiaoyuanError as error:
        raise invalid(str(error)) from error
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        try:
            async for event in events:
                piece = reader.read(event)
                yield piece
                if piece.finish_reason:
                    return
        except LiaoyuanError as error:
            raise ApiError(500, str(error), code="engine_failed") from error


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
