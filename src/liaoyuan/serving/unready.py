"""Answers while a model is still being loaded: 503, so that whoever watches sees a server that is coming, not none."""

import contextlib
import json
import selectors
import socket
import threading
from collections.abc import Iterator

from liaoyuan.serving.errors import RETRY_AFTER_SECONDS, ApiError

BODY = json.dumps(ApiError(503, "The model is being loaded.", code="loading").body()).encode()
REPLY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Retry-After: %d\r\nContent-Length: %d\r\n\r\n%s" % (RETRY_AFTER_SECONDS, len(BODY), BODY)
)
PATIENCE_SECONDS = 1.0  # for a request to come; others wait for it meanwhile


@contextlib.contextmanager
def answering_unready(bound: socket.socket) -> Iterator[None]:
    """Answer whoever connects to a listening socket that nothing is ready; who comes later waits in its queue."""
    wake, woken = socket.socketpair()
    thread = threading.Thread(target=_answer_all, args=(bound, woken), name="unready", daemon=True)
    thread.start()
    try:
        yield
    finally:
        wake.close()
        thread.join()
        woken.close()


def _answer_all(bound: socket.socket, woken: socket.socket) -> None:
    with selectors.DefaultSelector() as selector:
        for watched in (bound, woken):
            selector.register(watched, selectors.EVENT_READ)
        while not any(key.fileobj is woken for key, _ in selector.select()):
            with contextlib.suppress(OSError):  # the client went away, or was too slow
                connection, _ = bound.accept()
                with connection:
                    _answer(connection)


def _answer(connection: socket.socket) -> None:
    connection.settimeout(PATIENCE_SECONDS)
    head = b""
    while b"\r\n\r\n" not in head and len(head) < 65536 and (data := connection.recv(65536)):
        head += data
    connection.sendall(REPLY)
