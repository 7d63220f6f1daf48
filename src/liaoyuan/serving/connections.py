"""Connections that nobody lets idle: whoever sends his request too slowly, or does not read the reply, is cut off.

uvicorn's own protocol closes a connection that is idle after a reply, and no other. A request's body has its time
from the door (`security.Access.body_seconds`).
"""

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # from the first byte, or from the connection, to the end of the headers
READ_SECONDS = 30.0  # for a client that has stopped reading a reply to begin again
MOST_CONNECTIONS = 8192
OTHER_FILES = 128  # that a process may have open besides its connections
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class PatientProtocol(H11Protocol):
    """HTTP/1.1 on one connection, with a time for everything that waits for the client."""

    head_seconds, read_seconds = HEAD_SECONDS, READ_SECONDS
    most_connections = max(16, min(MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.write(FULL)
            transport.close()
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._unread)
        self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # A closing connection still waits for the client to read what was written.
        self._unread = self._unread or self.loop.call_later(self.read_seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        _stop(self._head)
        _stop(self._unread)

    def _watch_head(self) -> None:
        """Run the clock while the head of a request is awaited, the first or one that has begun."""
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        awaited = self.conn.their_state is h11.IDLE and begun and not self.transport.is_closing()
        if awaited and self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self._too_slow)
        elif not awaited:
            _stop(self._head)
            self._head = None

    def _too_slow(self) -> None:
        self._head = None
        if not self.transport.is_closing():
            self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
