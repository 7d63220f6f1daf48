"""`/v1/messages`: Anthropic's API over the same path as chat; blocks of thinking, text and calls of tools.

The reply that is not streamed is put together from the very events that a stream would send, so both say the same.
"""

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from liaoyuan.serving.conversation import chat_jobs, chat_prompt
from liaoyuan.serving.errors import ANTHROPIC_PATH, ApiError, invalid
from liaoyuan.serving.generation import EventStream, Job, Served, collect, first_and_rest, server_event, start
from liaoyuan.serving.messages_body import CountTokensRequest, MessagesRequest
from liaoyuan.serving.text import Piece

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "timeout": "max_tokens", "tool_calls": "tool_use"}

ServerEvent = dict[str, Any]


def message_routes(served: Served) -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()

    @router.post(ANTHROPIC_PATH, response_model=None)
    async def messages(http: HttpRequest, body: MessagesRequest) -> Response:
        served.choose_model(body.model)
        job = await asyncio.to_thread(_job, served, body)  # a long prompt must not hold up the streams of others
        pieces = start(served, [job])
        reply = _Reply(served, body, job)
        if body.stream:
            return EventStream(_stream(reply, await first_and_rest(http, pieces)))
        return JSONResponse(_whole(reply.events((await collect(http, pieces, 1))[0])))

    @router.post(ANTHROPIC_PATH + "/count_tokens", response_model=None)
    async def count_tokens(body: CountTokensRequest) -> dict[str, int]:
        served.choose_model(body.model)
        return {"input_tokens": len(await asyncio.to_thread(chat_prompt, served, body.chat()))}

    return router


def _job(served: Served, body: MessagesRequest) -> Job:
    """Return the answer to be generated. More tokens than there is room for are no mistake in this API."""
    [job] = chat_jobs(served, body.chat())
    room = served.context_length - len(job.prompt)
    if room < 1:
        raise invalid(f"The prompt is too long: {len(job.prompt)} tokens, and the context is {served.context_length}.")
    return replace(job, sampling=replace(job.sampling, max_tokens=min(room, body.max_tokens)))


async def _stream(reply: "_Reply", pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
    """Yield server-sent events; an error in mid-stream is the last of them."""
    try:
        async for _, piece in pieces:
            for event in reply.next_events(piece):
                yield _named(event)
    except ApiError as error:
        yield _named(error.anthropic_body())


def _named(event: ServerEvent) -> str:
    return f"event: {event['type']}\n{server_event(event)}"


def _whole(events: Iterable[ServerEvent]) -> dict[str, Any]:
    """Return the message that the events of a stream make."""
    message: dict[str, Any] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = {**event["message"], "content": []}
            case "content_block_start":
                message["content"].append(dict(event["content_block"]))
                parts: list[str] = []
            case "content_block_delta":
                kind, part = event["delta"].values()
                parts += [part] if kind != "signature_delta" else []
                message["content"][-1] |= {"signature": part} if kind == "signature_delta" else {}
            case "content_block_stop":
                _fill(message["content"][-1], "".join(parts))
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    return message


def _fill(block: dict[str, Any], text: str) -> None:
    """Give a block what its deltas said."""
    if block["type"] == "tool_use":
        block["input"] = _arguments(text)
    else:
        block[block["type"]] = text  # "text" or "thinking"


def _arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments; none if the answer was cut off within them."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return values if isinstance(values, dict) else {}


@dataclass
class _Reply:
    """The events of one reply."""

    served: Served
    body: MessagesRequest
    job: Job
    id: str = field(default_factory=lambda: "msg_" + secrets.token_hex(12))

    def __post_init__(self) -> None:
        self._kind = ""  # of the open block
        self._index = -1
        self._started = False
        self._thought = hashlib.sha256()
        self._spoken = False

    def events(self, pieces: Iterable[Piece]) -> Iterator[ServerEvent]:
        for piece in pieces:
            yield from self.next_events(piece)

    def next_events(self, piece: Piece) -> Iterator[ServerEvent]:
        """Yield the events that say one piece."""
        if not self._started:
            self._started = True
            yield {"type": "message_start", "message": self._message(piece)}
            yield {"type": "ping"}
        if piece.reasoning:
            yield from self._think(piece.reasoning)
        if piece.content:
            yield from self._block("text", {"type": "text", "text": ""})
            yield self._delta("text_delta", text=piece.content)
        for call in piece.calls:
            if call.name:
                tool = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                yield from self._block(f"tool {call.index}", tool)
            if call.arguments:
                yield self._delta("input_json_delta", partial_json=call.arguments)
        if piece.finish_reason:
            yield from self._end(piece)

    def _think(self, thought: str) -> Iterator[ServerEvent]:
        yield from self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        self._thought.update(thought.encode())
        if not (self.body.thinking and self.body.thinking.display == "omitted"):
            yield self._delta("thinking_delta", thinking=thought)

    def _block(self, kind: str, content: dict[str, Any]) -> Iterator[ServerEvent]:
        """Open a block, unless one of this kind is open, and close the one before."""
        if kind == self._kind:
            return
        yield from self._close()
        self._kind, self._index = kind, self._index + 1
        self._spoken |= kind != "thinking"
        yield {"type": "content_block_start", "index": self._index, "content_block": content}

    def _close(self) -> Iterator[ServerEvent]:
        if not self._kind:
            return
        if self._kind == "thinking":  # clients send a thought back only with a signature; nobody checks this one
            yield self._delta("signature_delta", signature=self._thought.hexdigest())
        yield {"type": "content_block_stop", "index": self._index}

    def _end(self, piece: Piece) -> Iterator[ServerEvent]:
        if not self._spoken:  # clients read the text of a block without asking whether there is one
            yield from self._block("text", {"type": "text", "text": ""})
        yield from self._close()
        reason = "stop_sequence" if piece.stop else STOP_REASONS.get(piece.finish_reason or "", "end_turn")
        if (
            reason == "max_tokens"
            and piece.completion_tokens < self.body.max_tokens
            and piece.finish_reason == "length"
        ):
            reason = "model_context_window_exceeded"
        delta = {"stop_reason": reason, "stop_sequence": piece.stop}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage(piece)}
        yield {"type": "message_stop"}

    def _delta(self, kind: str, **values: str) -> ServerEvent:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **values}}

    def _message(self, piece: Piece) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.served.answering,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**self._usage(piece), "output_tokens": 0, "output_tokens_details": None},
        }

    def _usage(self, piece: Piece) -> dict[str, Any]:
        """Return the counts so far; `input_tokens` are those that were not found in the prefix cache."""
        return {
            "input_tokens": len(self.job.prompt) - piece.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": piece.cached_tokens,
            "output_tokens": piece.completion_tokens,
            "output_tokens_details": {"thinking_tokens": piece.reasoning_tokens},
        }
