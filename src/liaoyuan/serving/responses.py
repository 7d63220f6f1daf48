"""`/v1/responses`: OpenAI's newer API over the same path as chat; items of reasoning, messages and function calls.

The reply that is not streamed is the last event of the stream, so both say the same.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from liaoyuan.serving.conversation import chat_jobs, chat_prompt
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import EventStream, Served, collect, first_and_rest, server_event, start
from liaoyuan.serving.responses_body import ResponsesRequest
from liaoyuan.serving.responses_events import ResponseEvents, ServerEvent
from liaoyuan.serving.text import Piece

MAX_STORED = 1000  # responses kept for `previous_response_id`
MAX_STORED_CHARACTERS = 64 * 2**20  # of all their conversations together


def response_routes(served: Served) -> APIRouter:
    """Return the router of these endpoints."""
    router, store = APIRouter(), Store()

    @router.post("/v1/responses", response_model=None)
    async def responses(http: HttpRequest, body: ResponsesRequest) -> Response:
        served.choose_model(body.model)
        earlier = store.conversation(body.previous_response_id) if body.previous_response_id else []
        chat = body.chat(earlier)
        [job] = await asyncio.to_thread(chat_jobs, served, chat)  # a long prompt must not hold up others' streams
        job = replace(job, progress=bool(body.stream and body.return_progress))
        pieces = start(served, [job])
        reply = ResponseEvents(served, body, job)
        if body.stream:
            return EventStream(_stream(reply, await first_and_rest(http, pieces), store, earlier))
        events = [event for piece in (await collect(http, pieces, 1))[0] for event in reply.next_events(piece)]
        store.keep(body, events[-1]["response"], earlier)
        return JSONResponse(events[-1]["response"])

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(body: ResponsesRequest) -> dict[str, Any]:
        served.choose_model(body.model)
        earlier = store.conversation(body.previous_response_id) if body.previous_response_id else []
        ids = await asyncio.to_thread(chat_prompt, served, body.chat(earlier))
        return {"object": "response.input_tokens", "input_tokens": len(ids)}

    @router.get("/v1/responses/{id}", response_model=None)
    async def get_response(id: str) -> dict[str, Any]:
        return store.get(id).response

    @router.delete("/v1/responses/{id}", response_model=None)
    async def delete_response(id: str) -> dict[str, Any]:
        store.delete(id)
        return {"id": id, "object": "response", "deleted": True}

    return router


async def _stream(
    reply: ResponseEvents, pieces: AsyncIterator[tuple[int, Piece]], store: "Store", earlier: list[dict[str, Any]]
) -> AsyncIterator[str]:
    """Yield server-sent events; an error in mid-stream makes the response one that failed."""
    try:
        async for _, piece in pieces:
            for event in reply.next_events(piece):
                if piece.finish_reason and "response" in event:
                    store.keep(reply.body, event["response"], earlier)
                yield _named(event)
    except ApiError as error:
        for event in reply.failed(error):
            yield _named(event)


def _named(event: ServerEvent) -> str:
    return f"event: {event['type']}\n{server_event(event)}"


@dataclass(frozen=True)
class Stored:
    """A response, and the conversation up to and with it as chat messages."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    characters: int


@dataclass
class Store:
    """The responses that later ones may go on from, in this process only; the oldest are forgotten first."""

    kept: OrderedDict[str, Stored] = field(default_factory=OrderedDict)
    characters: int = 0

    def keep(self, body: ResponsesRequest, response: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
        """Keep a response that is done, unless the request says `store: false`."""
        if body.store is False:
            return
        answer = ResponsesRequest.model_validate({"input": response["output"]}).turns() if response["output"] else []
        messages = [*earlier, *body.turns(), *answer]
        characters = sum(len(str(message)) for message in messages)
        self.kept[response["id"]] = Stored(response, messages, characters)
        self.characters += characters
        while len(self.kept) > MAX_STORED or self.characters > MAX_STORED_CHARACTERS:
            self.characters -= self.kept.popitem(last=False)[1].characters

    def conversation(self, id: str) -> list[dict[str, Any]]:
        """Return the chat messages up to a response and with it."""
        return self.get(id, "previous_response_id").messages

    def get(self, id: str, param: str = "response_id") -> Stored:
        """Return what is kept of a response. Raises ApiError (404) if it is not here, or no longer."""
        stored = self.kept.get(id)
        if stored is None:
            message = (
                f"There is no response '{id}' here: this process keeps the last {MAX_STORED} at most. "
                "Give the earlier turns in 'input'."
            )
            raise ApiError(404, message, param, "response_not_found")
        self.kept.move_to_end(id)
        return stored

    def delete(self, id: str) -> None:
        """Forget a response. Raises ApiError (404) if it is not here."""
        self.characters -= self.get(id).characters
        del self.kept[id]
