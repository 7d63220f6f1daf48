"""Promises at the door: keys are asked for, limits hold, and no client can wait so that others wait too."""

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.serving import Access, Keys, build_app, open_server, read_keys
from liaoyuan.serving.connections import PatientProtocol
from liaoyuan.serving.unready import answering_unready
from tests.serving.conftest import ScriptedRunner, chat_tokens, serving

MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
ENDLESS = "1 + 2 + 1 = 4. " * 400
PATIENCE = 60.0  # seconds to wait for what should happen at once, on a busy machine


@contextlib.contextmanager
def guarded(tokenizer: Tokenizer, access: Access, answer: str = "42", pace: float = 0.0) -> Iterator[tuple]:
    """Serve a model that always gives this answer behind this door; yield a client and its runner."""
    runner = ScriptedRunner(lambda request: chat_tokens(tokenizer, "</think>" + answer), pace)
    with (
        serving(build_app(runner, tokenizer, "scripted", 8192, access=access)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as client,
    ):
        yield client, runner


def chat(client: httpx.Client, headers: dict | None = None, **fields: object) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields}, headers=headers)


KEYED = Access(keys=Keys({"alice": "secret-of-alice", "bob": "secret-of-bob"}))


def test_a_key_is_asked_for_and_its_name_shares_the_engine(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, KEYED) as (client, runner):
        for headers in ({"Authorization": "Bearer secret-of-alice"}, {"X-Api-Key": "secret-of-bob"}):
            assert chat(client, headers).status_code == 200
        assert [request.key for request in runner.requests] == ["alice", "bob"]
        for headers in (
            {},
            {"Authorization": "Bearer secret-of-alic"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic c2VjcmV0"},
            {"X-Api-Key": "alice"},
            {"X-Api-Key": "\u00e4"},
        ):
            reply = chat(client, {name: value.encode("latin-1") for name, value in headers.items()})
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["type"] == "authentication_error"
            assert "secret-of-alice" not in reply.text
        assert len(runner.requests) == 2


def test_the_official_client_says_a_wrong_key_is_wrong(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, KEYED) as (client, _):
        url = str(client.base_url) + "/v1"
        with openai.OpenAI(base_url=url, api_key="wrong-key", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError) as refused:
                wrong.models.list()
            assert refused.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=url, api_key="secret-of-bob", max_retries=0) as right:
            assert [model.id for model in right.models.list()] == ["scripted"]


def test_health_and_the_page_need_no_key_and_all_else_does(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, KEYED) as (client, _):
        for path in ("/health", "/ready", "/health/ready", "/ping", "/", "/page/main.js"):
            assert client.get(path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/tokenizer_info", "/page/about", "/none"):
            assert client.get(path).status_code == 401, path
        assert client.post("/page/render", json={"text": "x"}).status_code == 401


def test_keys_are_read_from_the_command_line_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalice first-secret  # of the team\n\nsecond-secret\n")
    keys = read_keys(["third-secret"], file)
    names = {secret: keys.name_of(secret) for secret in ("first-secret", "second-secret", "third-secret", "alice", "")}
    assert names == {
        "third-secret": "key-1",
        "first-secret": "alice",
        "second-secret": "key-3",
        "alice": None,
        "": None,
    }
    assert not read_keys()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("short", "at least 8 characters"),
        ("a b c-secret-c", "3 words"),
        ("same-secret\nbob same-secret", "line 2 .* came before"),
        ("# nothing\n", "holds no API key"),
        ("\u00e4\u00e4\u00e4\u00e4\u00e4\u00e4\u00e4\u00e4", "ASCII"),
    ],
)
def test_a_bad_file_of_keys_is_refused_without_a_word_of_a_key(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(LiaoyuanError, match=why) as refused:
        read_keys((), file)
    assert "secret" not in str(refused.value)
    with pytest.raises(LiaoyuanError, match="cannot be read"):
        read_keys((), tmp_path / "missing")


def test_more_than_so_many_at_once_are_told_to_come_back(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, Access(max_concurrent=1), ENDLESS, pace=0.002) as (client, runner):
        body = {"messages": MESSAGES, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body):
            reply = chat(client)
            assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 0
            assert client.get("/health").status_code == 200  # who watches is not counted
        wait_until(lambda: runner.open == 0)
        assert chat(client, max_tokens=2).status_code == 200


def test_a_smaller_limit_of_bodies(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, Access(max_body_bytes=1000)) as (client, _):
        reply = chat(client, user="x" * 1000)
        assert reply.status_code == 413 and "MiB" in reply.json()["error"]["message"]
        assert chat(client).status_code == 200


def test_a_request_has_an_id_its_own_or_a_new_one(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, Access()) as (client, _):
        ids = [client.get("/ping").headers["x-request-id"] for _ in range(2)]
        assert len(set(ids)) == 2 and all(ids)
        reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "my-1"})
        assert reply.headers["x-request-id"] == "my-1" and reply.json()["id"] == "cmpl-my-1"
        reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "request_id": "my-2"})
        assert reply.json()["id"] == "cmpl-my-2"
        long = client.get("/ping", headers={"X-Request-Id": "x" * 500}).headers["x-request-id"]
        assert len(long) < 100


def test_pages_of_other_sites_may_not_ask_unless_allowed(tokenizer: Tokenizer) -> None:
    origin = {"Origin": "https://app.example"}
    asking = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with guarded(tokenizer, KEYED) as (client, _):
        assert client.options("/v1/models", headers=asking).status_code == 401
        assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    allowed = Access(keys=KEYED.keys, origins=("https://app.example",))
    with guarded(tokenizer, allowed) as (client, _):
        reply = client.options("/v1/models", headers=asking)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        refused = client.get("/v1/models", headers=origin)  # the page can read why
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
        other = client.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("allowed", "origin", "may"),
    [
        ("*", "https://app.example", True),
        ("localhost", "http://localhost:8080", True),
        ("localhost", "http://[::1]:3000", True),
        ("localhost", "http://localhost.evil.example", False),
        ("https://app.example", "https://appXexample", False),
    ],
)
def test_which_pages_may_ask(tokenizer: Tokenizer, allowed: str, origin: str, may: bool) -> None:
    asking = {"Origin": origin, "Access-Control-Request-Method": "DELETE"}
    with guarded(tokenizer, Access(keys=KEYED.keys, origins=(allowed,))) as (client, _):
        headers = client.options("/v1/responses/1", headers=asking).headers
    assert headers.get("access-control-allow-origin") == (origin if may else None)
    assert "DELETE" in headers["access-control-allow-methods"] and "access-control-allow-credentials" not in headers


def test_time_that_is_up_is_said(model_folder: Path) -> None:
    with (
        open_server(model_folder, port=0, access=Access(timeout=0.02)) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=PATIENCE) as client,
    ):
        reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 250, "ignore_eos": True})
        if reply.status_code == 504:  # before its first token
            assert reply.json()["error"]["code"] == "timeout"
        else:
            assert reply.json()["choices"][0]["finish_reason"] == "timeout"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients get half a second for what they owe."""
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.5)
    monkeypatch.setattr(PatientProtocol, "read_seconds", 0.5)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"P", HEAD, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he"],
    ids=["", "P", "head", "second"],
)
def test_a_request_that_never_comes_is_cut_off(tokenizer: Tokenizer, impatient: None, sent: bytes) -> None:
    with guarded(tokenizer, Access()) as (client, _), connected(client) as connection:
        connection.sendall(sent)
        assert_closed(connection)


def test_a_head_that_comes_byte_by_byte_is_cut_off(tokenizer: Tokenizer, impatient: None) -> None:
    with guarded(tokenizer, Access()) as (client, _), connected(client) as connection:
        connection.setblocking(False)
        deadline = time.monotonic() + PATIENCE
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                connection.send(b"x")
                select.select([connection], [], [], 0.02)
                with contextlib.suppress(BlockingIOError):
                    connection.recv(1)


def test_half_a_body_is_refused_in_time(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, Access(body_seconds=0.3)) as (client, _), connected(client) as connection:
        connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"messages": [')
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert_closed(connection)


def test_a_client_that_never_reads_is_cut_off(tokenizer: Tokenizer, impatient: None) -> None:
    with guarded(tokenizer, Access(), ENDLESS, pace=0.0005) as (client, runner):
        body = json.dumps({"messages": MESSAGES, "stream": True, "n": 12}).encode()
        with connected(client, receive_buffer=4096) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            wait_until(lambda: runner.open == 12)
            wait_until(lambda: runner.open == 0)
        assert runner.aborted == 12  # long before they would have ended
        assert chat(client, max_tokens=2).status_code == 200


def test_a_thousand_idle_connections_do_not_stop_the_rest(tokenizer: Tokenizer) -> None:
    with guarded(tokenizer, Access()) as (client, _), contextlib.ExitStack() as idle:
        for _ in range(1000):
            idle.enter_context(connected(client)).sendall(b"POST /v1/")
        assert chat(client).status_code == 200


def test_connections_beyond_the_most_are_told_so(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "most_connections", 2)
    with guarded(tokenizer, Access()) as (client, _), connected(client) as one, connected(client) as two:
        for each in (one, two):
            each.sendall(b"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert each.recv(65536).startswith(b"HTTP/1.1 200 ")
        with connected(client) as third:
            assert third.recv(65536).startswith(b"HTTP/1.1 503 ")
            assert_closed(third)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00" * 100,
        b"\xff\xfe\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        HEAD.replace(b"application/json", b"multipart/form-data") + b"Content-Length: 2\r\n\r\n{}",
        HEAD + b"Content-Length: 9\r\n\r\n" + b'{"a\x00": 1}'[:9],
    ],
)
def test_what_is_no_request_is_refused(tokenizer: Tokenizer, raw: bytes) -> None:
    with guarded(tokenizer, Access()) as (client, _):
        with connected(client) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(raw)
            reply = connection.recv(65536)
            assert reply == b"" or reply.startswith(b"HTTP/1.1 4"), reply[:100]
        assert client.get("/ping").status_code == 200


def test_a_server_that_loads_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/ready"
        with answering_unready(bound):
            with socket.create_connection(bound.getsockname()):  # who says nothing does not stop it
                reply = httpx.get(url, trust_env=False, timeout=PATIENCE)
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "loading"
            assert int(reply.headers["retry-after"]) > 0


def test_a_server_is_ready_only_while_its_engine_is(model_folder: Path) -> None:
    with (
        open_server(model_folder, port=0, control=True) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=PATIENCE) as client,
    ):
        assert client.get("/ready").json() == {"status": "ready"}
        for stop, go_on, state in (("/pause", "/resume", "paused"), ("/sleep", "/wake_up", "asleep")):
            assert client.post(stop).json()["state"] == state
            assert client.get("/ready").status_code == client.get("/health/ready").status_code == 503
            assert client.get("/health").status_code == 200  # it need not be started anew
            refused = client.post("/v1/embeddings", json={"input": "x"})
            assert refused.status_code == 503 and state in refused.json()["error"]["message"]
            assert client.post(go_on).json()["state"] == "ready"
            assert client.get("/ready").status_code == 200


@contextlib.contextmanager
def connected(client: httpx.Client, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """Give a socket of one's own to the server."""
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE)
        connection.connect((client.base_url.host, client.base_url.port))
        yield connection


def assert_closed(connection: socket.socket) -> None:
    """The server closes the connection, whatever it says before."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
