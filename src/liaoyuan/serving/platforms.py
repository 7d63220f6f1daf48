"""The paths under which clouds call the server in a container: Amazon's `/invocations` (its health is `/ping`), and
Google's `/predict`. What they bring is a request of another path, told by its fields.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.types import Message, Receive, Scope, Send

from liaoyuan.serving.errors import invalid
from liaoyuan.serving.protocol import MAX_CHOICES, Body

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
# The first of these fields that a body has says what it asks; conversations are embedded only by their own path.
PATHS = {
    "messages": CHAT,
    "prompt": COMPLETIONS,
    "input": EMBEDDINGS,
    "query": "/rerank",
    "queries": "/score",
    "text_1": "/score",
    "data_1": "/score",
}
EMBEDS = ("encoding_format", "dimensions", "use_activation")  # what only a request for embeddings says
FORMAT = "@requestFormat"  # what Google's clients put into each instance
FORMATS = {"chatCompletions": CHAT, "completions": COMPLETIONS, "embeddings": EMBEDDINGS}


class PredictRequest(Body):
    """Body of `/predict`: requests, each of which says in "@requestFormat" what it is, or shows it by its fields.

    parameters: fields that all of them have, unless they say otherwise.
    """

    instances: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_CHOICES)]
    parameters: dict[str, Any] | None = None


def platform_routes() -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()

    @router.post("/invocations", response_model=None)
    async def invocations(http: HttpRequest, body: dict[str, Any]) -> Response:
        return _Elsewhere(http, _path(body), body)

    @router.post("/predict", response_model=None)
    async def predict(http: HttpRequest, body: PredictRequest) -> JSONResponse:
        """Answer several requests at once; the first that is refused refuses them all."""
        asked = [{**(body.parameters or {}), **instance} for instance in body.instances]
        paths = [_named_path(instance.pop(FORMAT, None)) or _path(instance) for instance in asked]
        asking = (_asked(http, path, instance) for path, instance in zip(paths, asked, strict=True))
        replies = await asyncio.gather(*asking)
        refused = next(((status, reply) for status, reply in replies if status >= 400), None)
        if refused:
            return JSONResponse(refused[1], refused[0])
        return JSONResponse({"predictions": [reply for _, reply in replies]})

    return router


def _path(body: Mapping[str, Any]) -> str:
    """Return the path whose request a body is."""
    if "messages" in body and any(name in body for name in EMBEDS):
        return EMBEDDINGS
    found = next((path for name, path in PATHS.items() if name in body), None)
    if found is None:
        raise invalid(f"The body must have one of {', '.join(PATHS)}, which say what is asked.")
    return found


def _named_path(form: Any) -> str | None:
    if form is not None and form not in FORMATS:
        raise invalid(f"'{FORMAT}' must be one of {', '.join(FORMATS)}, or left out.", FORMAT)
    return FORMATS[form] if form is not None else None


class _Elsewhere(Response):
    """The reply of another path to a body; a stream goes on as it does there."""

    def __init__(self, http: HttpRequest, path: str, body: Mapping[str, Any]) -> None:
        super().__init__()
        self._http, self._path, self._body = http, path, json.dumps(body).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()  # waits for the client to go
            given = True
            return {"type": "http.request", "body": self._body, "more_body": False}

        there = {**scope, "path": self._path, "raw_path": self._path.encode()}
        await self._http.app.router(there, again, send)


async def _asked(http: HttpRequest, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Return the status and the JSON of the reply of `path`."""
    if body.get("stream"):
        raise invalid("An instance of '/predict' cannot be streamed.", "stream")
    status, parts = 0, bytearray()

    async def keep(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.extend(message.get("body", b""))

    await _Elsewhere(http, path, body)(http.scope, http.receive, keep)
    return status, json.loads(parts)
