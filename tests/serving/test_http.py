"""Promises at the door: no body can break the server, a lost client frees what it held, replies are guarded."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import open_server
from liaoyuan.serving.markdown import render
from tests.serving.conftest import ScriptedRunner, scripted

MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
ENDLESS = "1 + 2 + 1 = 4. " * 200
PATIENCE = 60.0  # seconds to wait for what should happen at once, on a busy machine


@pytest.fixture(scope="module")
def said(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    with scripted(tokenizer, "7 + 5 = 12</think>The answer is 42.") as serving:
        yield serving


@pytest.fixture(scope="module")
def client(said: tuple[str, ScriptedRunner]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=said[0], trust_env=False, timeout=PATIENCE) as made:
        yield made


def chat(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"17",
    b"\xff\xfe",
    b'{"messages": []}',
    b'{"messages": "hello"}',
    b'{"messages": [{"role": "user"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "robot", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 99999999999999999999}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 100000}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": [""]}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": [1]}',
    b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}',
    b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 5}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
]


@pytest.mark.parametrize("body", BODIES, ids=[body[-48:].decode("latin-1") for body in BODIES])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/page/render"])
def test_a_bad_body_is_refused_with_a_sentence(client: httpx.Client, path: str, body: bytes) -> None:
    reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "seed",
    "stream",
    "echo",
]
FIELDS += ["logprobs", "stream_options", "messages", "tools", "logit_bias", "ignore_eos", "stop_token_ids"]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_body_makes_the_server_fail(client: httpx.Client, fields: dict) -> None:
    body = json.dumps({"prompt": "x", "messages": MESSAGES, **fields})
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code < 500, reply.text


def test_a_huge_body_is_refused(client: httpx.Client) -> None:
    huge = b'{"prompt": "' + b"x" * (5 * 2**20) + b'"}'
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/completions", content=huge, headers=headers).status_code == 413
    pieces = (huge[at : at + 65536] for at in range(0, len(huge), 65536))  # without a Content-Length
    reply = client.post("/v1/completions", content=pieces, headers=headers)
    assert reply.status_code == 413 and "MiB" in reply.json()["error"]["message"]


def test_what_is_not_there_is_said_in_the_same_shape(client: httpx.Client) -> None:
    for reply, status in ((client.get("/nothing"), 404), (client.get("/v1/completions"), 405)):
        assert reply.status_code == status and reply.json()["error"]["message"]
    assert client.get("/page/../server.py").status_code == 404
    assert client.get("/page/%2e%2e/server.py").status_code == 404


def test_a_body_of_another_site_is_refused(client: httpx.Client) -> None:
    """A page of another site can send text/plain here without asking; JSON it cannot."""
    body = json.dumps({"messages": MESSAGES})
    assert client.post("/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"}).status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_another_host_name_is_refused(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "LOCALHOST:8000", "[::1]:8000"])
def test_the_loopbacks_names_are_served(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/v1/models", "/nothing", "/page/about"])
def test_every_reply_is_guarded(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in headers


def test_the_page_has_no_inline_code_and_names_no_other_site(client: httpx.Client) -> None:
    for name in ("", "page/main.js", "page/api.js", "page/view.js", "page/words.js", "page/style.css"):
        text = client.get("/" + name).text
        assert "https://" not in text and "http://" not in text
        assert " style=" not in text and "<style" not in text and " on" + "click=" not in text


def test_a_full_queue_says_when_to_come_back(said: tuple[str, ScriptedRunner], client: httpx.Client) -> None:
    said[1].busy = True
    try:
        for stream in (False, True):
            reply = chat(client, stream=stream)
            assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 0
            assert reply.json()["error"]["type"] == "rate_limit_error"
    finally:
        said[1].busy = False


def test_an_engine_that_fails_is_told_whole_and_in_mid_stream(
    said: tuple[str, ScriptedRunner], client: httpx.Client
) -> None:
    said[1].failure = "The engine failed."
    try:
        assert chat(client).status_code == 500
        events = [line for line in chat(client, stream=True).text.split("\n\n") if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["message"] == "The engine failed."
        assert events[-1] == "data: [DONE]"
    finally:
        said[1].failure = ""
    assert chat(client).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_lost_client_ends_its_answers(tokenizer: Tokenizer, stream: bool, choices: int) -> None:
    with scripted(tokenizer, ENDLESS, pace=0.002) as (url, runner):
        with lost_client(url, {"messages": MESSAGES, "stream": stream, "n": choices}):
            wait_until(lambda: runner.open == choices)
        wait_until(lambda: runner.open == 0)
        assert runner.aborted == choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_lost_client_frees_its_blocks(model_folder: Path, stream: bool) -> None:
    config = EngineConfig(max_sequences=8)
    with (
        open_server(model_folder, port=0, engine=config) as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
    ):
        whole = client.get("/health").json()["free_blocks"]
        # Long enough for several such requests to be noticed at work, and never to end by themselves meanwhile.
        body = {"messages": MESSAGES, "stream": stream, "ignore_eos": True, "n": 8}
        seen = 0
        for _ in range(40):
            with lost_client(server.url, body):
                seen = max(seen, client.get("/health").json()["running"])
            if seen:
                break
        assert seen
        wait_until(lambda: client.get("/health").json()["open"] == 0)
        state = client.get("/health").json()
        assert (state["running"], state["waiting"], state["free_blocks"]) == (0, 0, whole)


def test_a_stop_string_ends_the_work_too(tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, "</think>" + ENDLESS) as (url, runner), httpx.Client(trust_env=False) as client:
        reply = client.post(url + "/v1/chat/completions", json={"messages": MESSAGES, "stop": "= 4"})
        assert reply.json()["choices"][0]["message"]["content"] == "1 + 2 + 1 "
        wait_until(lambda: runner.open == 0)
        assert runner.aborted == 1


def test_messages_reach_the_model_as_the_template_says(
    said: tuple[str, ScriptedRunner], client: httpx.Client, tokenizer: Tokenizer
) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "<|end|>?"}]
    sent = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi", "reasoning": "old thought", "refusal": None, "tool_calls": None},
        {"role": "user", "content": parts},
    ]
    reply = chat(client, messages=sent, reasoning_effort="none")
    expected = tokenizer.render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "What is <|end|>?"},
        ],
        thinking=False,
    )
    assert list(said[1].requests[-1].prompt) == expected
    assert reply.json()["usage"]["prompt_tokens"] == len(expected)


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "![x](https://evil.example/?secret)",
        '<a href="x" onclick="alert(1)">y</a>',
        '[x](https://a.example "t\\" onmouseover=alert(1)")',
        "<svg/onload=alert(1)>",
        "<https://a.example/\"onclick='x'>",
        "```<script>\nalert(1)\n```",
        "<style>*{display:none}</style><iframe src=//evil.example></iframe>",
    ],
)
def test_hostile_markdown_is_only_text(hostile: str) -> None:
    from html.parser import HTMLParser

    class Seen(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag in {"p", "a", "pre", "code"}
            for name, value in attributes:
                assert name in {"href", "title", "rel", "class"}
                if name == "href":
                    assert urlparse(value or "").scheme in {"", "http", "https", "mailto"}

    Seen().feed(render(hostile))


def test_markdown_is_rendered(client: httpx.Client) -> None:
    text = "# A\n\n**b** `c` ~~d~~\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n- e\n"
    html = client.post("/page/render", json={"text": text}).json()["html"]
    for part in ("<h1>A</h1>", "<strong>b</strong>", "<code>c</code>", "<s>d</s>", "<td>2</td>", "<li>e</li>"):
        assert part in html


def test_many_requests_at_once(client: httpx.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: chat(client), range(64)))
    assert {reply.json()["choices"][0]["message"]["content"] for reply in replies} == {"The answer is 42."}


class lost_client:  # noqa: N801  (reads as a phrase)
    """Send a request over a socket of one's own, and hang up at the end of the block without having read a reply."""

    def __init__(self, url: str, body: dict) -> None:
        address = urlparse(url)
        self._socket = socket.create_connection((address.hostname, address.port))
        raw = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
