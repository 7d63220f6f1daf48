"""What guards the door: API keys, the size and pace of bodies, how many may ask at once, the Host header (DNS
rebinding), and the headers of every reply.

Plain ASGI, so that streams pass through without a buffer and a lost client is noticed.
"""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liaoyuan.serving.caller import CALLER, Caller
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.keys import Keys
from liaoyuan.serving.metrics import Metrics

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HEALTH = frozenset({"/health", "/v1/health", "/health/ready", "/ready", "/ping"})  # whoever watches a server has no key
UNREAD = (408, 413)  # replies to a body of which the rest is not read: the connection cannot go on
LONGEST_ID = 128  # characters of a client's X-Request-Id
LINGER_SECONDS, LINGER_BYTES = 2.0, 64 * 2**20


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much of this server.

    loopback_only: answer only requests that name this machine's loopback (a page of another site that rebinds its
        name to 127.0.0.1 names itself). origins: of pages that may ask from a browser; "*": of all; "localhost": of
        this machine at any port; none: no CORS.
    max_body_bytes: the default has room for a prompt of a million tokens. body_seconds: within which a body is here.
    max_concurrent: requests that are answered at once; None: as many as come. timeout: seconds for an answer.
    """

    keys: Keys = field(default_factory=Keys)
    loopback_only: bool = True
    origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    max_concurrent: int | None = None
    timeout: float | None = None


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(
        self, app: ASGIApp, access: Access, metrics: Metrics, wanted: Callable[[], None] = lambda: None
    ) -> None:
        """wanted: called for every request that brings a body."""
        self._app, self._access, self._metrics, self._wanted = app, access, metrics, wanted
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        guarded = self._metrics.counted(scope["path"], _with_headers(send, request_id))
        try:
            caller = self._admit(scope, headers, request_id)
        except ApiError as refusal:
            await _read_on(receive)
            return await refusal.response(scope["path"])(scope, receive, guarded)
        CALLER.set(caller)
        limited = _limited(receive, self._access)
        if not _is_work(scope):
            return await self._app(scope, limited, guarded)
        self._wanted()
        self._open += 1
        try:
            return await self._app(scope, limited, guarded)
        finally:
            self._open -= 1

    def _admit(self, scope: Scope, headers: dict[bytes, bytes], request_id: str) -> Caller:
        """Return who asks. Raises ApiError if he may not."""
        access, most = self._access, self._access.max_concurrent
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if access.loopback_only and _name(host) not in LOOPBACK_NAMES:
            message = f"The host '{host}' is not this machine; use http://127.0.0.1."
            raise ApiError(403, message, code="host_not_allowed")
        name = "" if not access.keys or _is_open(scope) else self._key_name(headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > access.max_body_bytes:
            raise _too_large(access)
        if most is not None and self._open >= most and _is_work(scope):
            raise ApiError(429, f"The server answers {most} requests at once. Try again in a moment.", code="busy")
        return Caller(request_id, name, scope["path"], access.timeout)

    def _key_name(self, headers: dict[bytes, bytes]) -> str:
        scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get(b"x-api-key", b"").decode("latin-1")
        name = self._access.keys.name_of(secret.strip())
        if name is None:
            wrong = "is wrong" if secret else "is missing"
            message = f"The API key {wrong}; send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'."
            raise ApiError(401, message, code="invalid_api_key")
        return name


def origins_pattern(origins: Sequence[str]) -> str:
    """Return the regular expression that the origins of allowed pages match; each of them is told its own name."""
    forms = {"*": ".*", "localhost": r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"}
    return "|".join(forms.get(origin, re.escape(origin)) for origin in origins)


def _is_open(scope: Scope) -> bool:
    """Return whether a request needs no key: health, and the files of the chat page (what they ask for needs one)."""
    path = scope["path"]
    page = path == "/" or (path.startswith("/page/") and path != "/page/about")
    return path in HEALTH or (page and scope["method"] in ("GET", "HEAD"))


def _is_work(scope: Scope) -> bool:
    """Return whether a request counts among those that are answered at once: those that bring a body."""
    return scope["method"] == "POST" and scope["path"] not in HEALTH


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Return the client's own id of a request if it sent a decent one, else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    decent = 0 < len(given) <= LONGEST_ID and given.isascii() and given.isprintable()
    return given if decent else secrets.token_hex(12)


def _name(host: str) -> str:
    """Return the host without its port: "[::1]:8000" -> "[::1]"."""
    return host[: host.index("]") + 1] if "]" in host else host.partition(":")[0]


def _too_large(access: Access) -> ApiError:
    message = f"The body is larger than {access.max_body_bytes / 2**20:g} MiB."
    return ApiError(413, message, code="request_too_large")


async def _read_on(receive: Receive) -> None:
    """Read a refused body for a while: a client that is still sending when the connection closes never sees why."""
    total, until = 0, time.monotonic() + LINGER_SECONDS
    with contextlib.suppress(TimeoutError):
        while total < LINGER_BYTES:
            message = await asyncio.wait_for(receive(), until - time.monotonic())
            total += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def _limited(receive: Receive, access: Access) -> Receive:
    """Return a receive that stops a body which grows too large or comes too slowly."""
    total, whole, until = 0, False, time.monotonic() + access.body_seconds

    async def limited() -> Message:
        nonlocal total, whole
        if whole:
            return await receive()  # only waits for the client to go
        try:
            message = await asyncio.wait_for(receive(), until - time.monotonic())
        except TimeoutError:
            # The framework lets this exception through.
            raise HTTPException(408, f"The body did not come within {access.body_seconds:g} seconds.") from None
        total += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if total > access.max_body_bytes:
            if not whole:
                await _read_on(receive)
            raise HTTPException(413, _too_large(access).message)
        return message

    return limited


def _with_headers(send: Send, request_id: str) -> Send:
    headers = {**HEADERS, "X-Request-Id": request_id}
    own = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            closing = [(b"connection", b"close")] if message["status"] in UNREAD else []
            message = {**message, "headers": [*message["headers"], *own, *closing]}
        await send(message)

    return guarded
