"""What guards the door: the size of bodies, the Host header (DNS rebinding), and the headers of every reply.

Plain ASGI, so that streams pass through without a buffer and a lost client is noticed.
"""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liaoyuan.serving.errors import ApiError

MAX_BODY_BYTES = 4 * 2**20  # room for a prompt of a million tokens; nothing honest is larger
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, loopback_only: bool) -> None:
        """loopback_only: answer only requests that name this machine's loopback (a page of another site that
        rebinds its name to 127.0.0.1 names itself)."""
        self.app, self.loopback_only = app, loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        guarded = _with_headers(send)
        refusal = self._refusal(headers)
        if refusal:
            return await refusal.response(scope["path"])(scope, receive, guarded)
        return await self.app(scope, _limited(receive), guarded)

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.loopback_only and _name(host) not in LOOPBACK_NAMES:
            return ApiError(
                403, f"The host '{host}' is not this machine; use http://127.0.0.1.", code="host_not_allowed"
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > MAX_BODY_BYTES:
            return _too_large()
        return None


def _name(host: str) -> str:
    """Return the host without its port: "[::1]:8000" -> "[::1]"."""
    return host[: host.index("]") + 1] if "]" in host else host.partition(":")[0]


def _too_large() -> ApiError:
    return ApiError(413, f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB.", code="request_too_large")


def _limited(receive: Receive) -> Receive:
    """Return a receive that stops a body (of unknown length) once it has grown too large."""
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise HTTPException(413, _too_large().message)  # the framework lets this one through
        return message

    return limited


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *own]}
        await send(message)

    return guarded
