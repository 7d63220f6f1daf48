"""One address before several replicas: an ASGI app that hands each request to one of them and its reply back.

It holds the head of a reply back until the first of its body is there: until then another replica can answer in its
place. What concerns all replicas (health, metrics, calls that change their state) is asked of all.
"""

import asyncio
import contextlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Collection
from typing import Any
from urllib.parse import urlsplit

import httpx
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from liaoyuan.serving.errors import RETRY_AFTER_SECONDS, ApiError
from liaoyuan.serving.everywhere import change_all, decides
from liaoyuan.serving.replicas import Call, Replica, Replicas
from liaoyuan.serving.routing import Routes, prompt_pieces
from liaoyuan.serving.totals import TOTALS, total_health, total_metrics

# Of one connection, not of the message that it carries (RFC 9110, sec. 7.6.1); the length is that of what we send.
HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host", b"expect"}
)
ELSEWHERE = (429, 502, 503)  # replies to which another replica may know better
MOST_BODY_BYTES = 4 * 2**20  # unless told otherwise, as a server's
ASK_SECONDS = 10.0  # within which a replica says how it is
KEPT_IDS = 10_000  # of responses, whose replica is remembered
RESPONSE_ID = re.compile(rb'"id":\s*"(resp_[^"]+)"')


class Front:
    """The app."""

    def __init__(self, replicas: Replicas, max_body_bytes: int, hosts: Collection[str]) -> None:
        """hosts: the names under which it may be asked; none: under all."""
        self._hosts = hosts
        self._replicas, self._max_body_bytes = replicas, max_body_bytes
        self._routes, self._homes = Routes(), OrderedDict[str, int]()
        self._counts: Counter[str] = Counter()
        self._given: Counter[int] = Counter()
        self._client: httpx.AsyncClient | None = None
        replicas.renewed = self._routes.forget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            asked = await self._read(scope, receive)
            everywhere = {
                "/health": self._health,
                "/metrics": self._metrics,
                **dict.fromkeys(TOTALS, self._together),
            }.get(asked.path)
            if everywhere and asked.method == "GET":
                await (await everywhere(asked))(scope, receive, send)
            elif asked.method == "POST" and decides(asked.path):
                reply = await asyncio.to_thread(change_all, self._replicas, asked)
                await reply(scope, receive, send)
            else:
                await _unless_gone(self._pass_on(asked, send), receive)
        except ApiError as error:
            reply = error.response(scope["path"])
            if error.status == 503:
                reply.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
            await reply(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> Call:
        host = urlsplit("//" + dict(scope["headers"]).get(b"host", b"").decode("latin-1")).hostname
        if self._hosts and host not in self._hosts:
            raise ApiError(
                403, f"The host '{host}' is not this machine; use http://127.0.0.1.", code="host_not_allowed"
            )
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "The client closed the request.")
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                most = f"{self._max_body_bytes / 2**20:g} MiB"
                raise ApiError(413, f"The body is larger than {most}.", code="request_too_large")
            if not message.get("more_body", False):
                break
        target = scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        headers = [pair for pair in scope["headers"] if pair[0].lower() not in HOP_BY_HOP]
        return Call(scope["method"], target, headers, bytes(body))

    async def _pass_on(self, asked: Call, send: Send) -> None:
        """Let a replica answer, and another one if it fails before anything was sent."""
        body = _json(asked.body)
        pieces, tried, refusal = prompt_pieces(body), set[int](), None
        while replica := self._choose(asked, body, pieces, tried):
            tried.add(replica.number)
            self._routes.given(pieces, replica.number)
            self._given[replica.number] += 1
            async with self._asking(replica, asked) as reply:
                if reply is None:
                    self._counts["failed"] += 1
                elif reply.status_code in ELSEWHERE and len(tried) < len(self._replicas.ready):
                    refusal = await _whole(reply)
                elif await self._hand_back(replica, asked, reply, send):
                    return
            self._counts["retried"] += 1
        if refusal is not None:
            await _send_whole(refusal, send)
            return
        which = "The replica that was asked has failed" if tried else "No replica is ready"
        raise ApiError(503, f"{which}; it is being started. Try again in a moment.", code="replica_failed")

    def _choose(self, asked: Call, body: Any, pieces: list[bytes], tried: set[int]) -> Replica | None:
        free = {replica.number: replica for replica in self._replicas.ready if replica.number not in tried}
        if not free:
            return None
        before = body.get("previous_response_id") if isinstance(body, dict) else None
        home = self._homes.get(before or asked.path.rpartition("/v1/responses/")[2].partition("/")[0])
        if home in free:
            return free[home]
        return free[self._routes.choose(pieces, {number: one.busy for number, one in free.items()})]

    @contextlib.asynccontextmanager
    async def _asking(self, replica: Replica, asked: Call) -> AsyncIterator[httpx.Response | None]:
        """Give the head of a replica's reply, or None if it failed before that."""
        client = self._client = self._client or httpx.AsyncClient(
            timeout=None, trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
        )
        request = client.build_request(
            asked.method, replica.url + asked.target, headers=asked.headers, content=asked.body
        )
        reply = None
        replica.busy += 1
        try:
            with contextlib.suppress(httpx.HTTPError):
                reply = await client.send(request, stream=True)
            yield reply
        finally:
            replica.busy -= 1
            if reply is not None:
                await reply.aclose()

    async def _hand_back(self, replica: Replica, asked: Call, reply: httpx.Response, send: Send) -> bool:
        """Send a reply as it comes; False if it broke off before anything was sent."""
        begun = False
        try:
            async for chunk in reply.aiter_raw():
                if not begun:
                    self._remember(asked, chunk, replica)
                    await send(_head(reply))
                    begun = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.HTTPError:
            self._counts["broken"] += begun
            if not begun:
                return False
            await send({"type": "http.response.body", "body": _broken(asked, reply), "more_body": False})
            return True
        if not begun:
            await send(_head(reply))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    def _remember(self, asked: Call, chunk: bytes, replica: Replica) -> None:
        """Remember who keeps a response that others may go on from."""
        if asked.path.endswith("/v1/responses") and (found := RESPONSE_ID.search(chunk)):
            self._homes[found[1].decode("latin-1")] = replica.number
            while len(self._homes) > KEPT_IDS:
                self._homes.popitem(last=False)

    async def _health(self, asked: Call) -> Response:
        replies = await self._ask_all(asked)
        states = [
            {**(_json(reply.content) if reply else {}), "ready": reply is not None, "pid": replica.pid}
            for replica, reply in zip(self._replicas.all, replies, strict=True)
        ]
        alive = [state for state in states if state.get("alive")]
        own = {"status": "ok" if alive else "failed", "alive": bool(alive), "replicas": states}
        return JSONResponse({**total_health(alive), **own}, 200 if alive else 503)

    async def _metrics(self, asked: Call) -> Response:
        plain = [pair for pair in asked.headers if pair[0].lower() != b"accept"]  # the plain format
        replies = await self._ask_all(Call(asked.method, asked.target, plain, asked.body))
        for reply in replies:
            if reply is not None and not reply.is_success:  # a key is missing
                return _response(reply)
        text = total_metrics(reply.text for reply in replies if reply is not None) + self._own_metrics()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _together(self, asked: Call) -> Response:
        replies = [reply for reply in await self._ask_all(asked) if reply is not None]
        refused = next((reply for reply in replies if not reply.is_success), None)
        if refused is not None:
            return _response(refused)
        if not replies:
            raise ApiError(503, "No replica is ready. Try again in a moment.", code="replica_failed")
        return JSONResponse(TOTALS[asked.path]([reply.json() for reply in replies]))

    def _own_metrics(self) -> str:
        replicas = self._replicas
        rows = [
            ("replicas", "gauge", {"": len(replicas.all)}),
            ("replicas_ready", "gauge", {"": len(replicas.ready)}),
            ("replica_starts_total", "counter", {"": sum(replica.starts for replica in replicas.all)}),
            ("replica_requests_total", "counter", {f'{{replica="{n}"}}': self._given[n] for n in sorted(self._given)}),
            ("replica_open", "gauge", {f'{{replica="{one.number}"}}': one.busy for one in replicas.all}),
            ("front_failed_total", "counter", {"": self._counts["failed"]}),
            ("front_retried_total", "counter", {"": self._counts["retried"]}),
            ("front_broken_total", "counter", {"": self._counts["broken"]}),
        ]
        lines = []
        for name, kind, samples in rows:
            lines.append(f"# TYPE liaoyuan_{name} {kind}")
            lines += [f"liaoyuan_{name}{labels} {value}" for labels, value in samples.items()]
        return "\n".join(lines) + "\n"

    async def _ask_all(self, asked: Call) -> list[httpx.Response | None]:
        async def ask(replica: Replica) -> httpx.Response | None:
            if not replica.url:
                return None
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(ASK_SECONDS), self._asking(replica, asked) as reply:
                    if reply is not None:
                        await reply.aread()
                    return reply
            return None

        return await asyncio.gather(*map(ask, self._replicas.all))


async def _unless_gone(work: Awaitable[None], receive: Receive) -> None:
    """Do some work, and give it up when the client goes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _head(reply: httpx.Response) -> Message:
    headers = [(name.lower(), value) for name, value in reply.headers.raw if name.lower() not in HOP_BY_HOP]
    return {"type": "http.response.start", "status": reply.status_code, "headers": headers}


def _broken(asked: Call, reply: httpx.Response) -> bytes:
    """Return how a stream ends whose replica is gone.

    Raises:
        ConnectionError: the reply is no stream of events: the connection is cut, so that nobody takes it for whole.
    """
    if not reply.headers.get("content-type", "").startswith("text/event-stream"):
        raise ConnectionError("the replica is gone in the middle of a reply")
    message = "The replica that answered has failed in the middle of the answer."
    if asked.path.endswith("/messages"):
        error = {"type": "error", "error": {"type": "api_error", "message": message}}
        return f"\n\nevent: error\ndata: {json.dumps(error)}\n\n".encode()
    body = ApiError(503, message, code="replica_failed").body()
    return f"\n\ndata: {json.dumps(body)}\n\ndata: [DONE]\n\n".encode()


async def _whole(reply: httpx.Response) -> httpx.Response | None:
    with contextlib.suppress(httpx.HTTPError):
        await reply.aread()
        return reply
    return None


async def _send_whole(reply: httpx.Response, send: Send) -> None:
    await send(_head(reply))
    await send({"type": "http.response.body", "body": reply.content, "more_body": False})


def _response(reply: httpx.Response) -> Response:
    return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None  # the replica says what is wrong with it
