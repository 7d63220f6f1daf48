"""A replica without a model, which starts at once, tells what it was asked, and dies when a request says so."""

import http.server
import json
import os
import sys
import threading
from typing import Any

NUMBER = int(os.environ["LOCAL_RANK"])
CALLS: list[str] = []
SAYS: dict[str, object] = {
    "/slots": [{"id": 0, "is_processing": NUMBER == 1}, {"id": 1, "is_processing": False}],
    "/props": {"total_slots": 2, "is_sleeping": NUMBER == 0, "model_alias": "tiny"},
    "/load": {"server_load": NUMBER + 1},
}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._reply(200, f'# TYPE asked counter\nasked{{path="/"}} {NUMBER + 1}\n'.encode())
        elif self.path in SAYS:
            self._reply(200, SAYS[self.path])
        else:
            self._reply(200, {"alive": True, "running": 1, "calls": CALLS})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        body: dict[str, Any] = json.loads(raw or b"{}")
        if body.get("who", NUMBER) != NUMBER:
            body = {"prompt": body.get("prompt")}
        match body.get("do"):
            case "die":
                os._exit(9)
            case "die in the middle":
                self._begin()
                self._chunk(b"data: one\n\n")
                self._chunk(b"data: tw")
                os._exit(9)
            case "wait":
                self._begin()
                while True:  # until nobody listens
                    self._chunk(b"data: more\n\n" * 1000)
            case "think":
                threading.Event().wait(30)
            case "busy" | "refuse":
                self._reply(429 if body["do"] == "busy" else 400, {"number": NUMBER})
            case _:
                CALLS.append(self.path)
                self._reply(200, {"number": NUMBER, "path": self.path, "host": self.headers["host"], "version": 7})

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:
            CALLS.append("gone")
            raise SystemExit from None

    def _reply(self, status: int, body: object) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    if "broken" in sys.argv:
        sys.exit("it cannot start")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
