"""`liaoyuan chat`: a conversation in the terminal, with a model folder or with any OpenAI-compatible server."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.errors import LiaoyuanError, nearest

if TYPE_CHECKING:
    import httpx

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
COMMANDS = {
    "/fast": "answer at once",
    "/slow": "think first",
    "/new": "forget the conversation",
    "/quit": "end",
    "/help": "show this",
}


def chat(
    model: Annotated[Path | None, typer.Option(help="Folder of the model to talk to.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server instead, such as http://127.0.0.1:8000/v1.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or an accelerator such as cuda:0.")] = "auto",
    temperature: Annotated[float, typer.Option(help="0 always says the most probable.", min=0, max=2)] = 0.6,
    fast: Annotated[bool, typer.Option("--fast", help="Answer at once, without thinking.")] = False,
) -> None:
    """Talk to a model. Ctrl-C stops an answer; /help shows the commands."""
    if (model is None) == (url is None):
        raise LiaoyuanError("Give either --model DIR or --url http://127.0.0.1:8000/v1.")
    import httpx

    with contextlib.ExitStack() as opened:
        if model is not None:
            from liaoyuan.serving import open_server

            url = opened.enter_context(open_server(model, port=0, device=device)).url + "/v1"
        client = opened.enter_context(httpx.Client(base_url=str(url), timeout=None, trust_env=False))
        Conversation(client, temperature, thinking=not fast, colour=sys.stdout.isatty()).run()


class Conversation:
    """Turns read from standard input and answers written to standard output."""

    def __init__(self, client: "httpx.Client", temperature: float, thinking: bool, colour: bool) -> None:
        self._client, self._temperature = client, temperature
        self._thinking, self._colour = thinking, colour
        self._messages: list[dict[str, str]] = []
        self._model = self._first_model()

    def run(self) -> None:
        """Answer each line until /quit or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lets `input` edit lines)
            print(self._dim(f"{self._model} · /help shows the commands"))
        for line in _lines(interactive):
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line.strip():
                self._turn(line)

    def _command(self, line: str) -> bool:
        """Do what a command says; return False for /quit."""
        word = line.split()[0]
        if word == "/quit":
            return False
        if word in ("/fast", "/slow"):
            self._thinking = word == "/slow"
        elif word == "/new":
            self._messages.clear()
        elif word == "/help":
            for name, meaning in COMMANDS.items():
                print(self._dim(f"{name}  {meaning}"))
        else:
            print(f"Unknown command {word}{nearest(word, COMMANDS) or '.'}", file=sys.stderr)
        return True

    def _turn(self, question: str) -> None:
        self._messages.append({"role": "user", "content": question})
        answer = ""
        try:
            for kind, text in self._stream():
                answer += text if kind == "content" else ""
                self._write(kind, text)
        except KeyboardInterrupt:
            self._write("content", " [stopped]")
        except LiaoyuanError as error:
            print(f"liaoyuan: {error}", file=sys.stderr)
            self._messages.pop()
            return
        self._write("end", "\n")
        self._messages.append({"role": "assistant", "content": answer})

    def _stream(self) -> Iterator[tuple[str, str]]:
        """Yield ("reasoning" or "content", text) as the answer comes; leaving early stops it on the server."""
        import httpx

        body = {
            "model": self._model,
            "messages": self._messages,
            "temperature": self._temperature,
            "stream": True,
            "chat_template_kwargs": {"enable_thinking": self._thinking},
        }
        try:
            with self._client.stream("POST", "/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise LiaoyuanError(_message(response))
                for line in response.iter_lines():
                    yield from _deltas(line)
        except httpx.HTTPError as error:
            raise LiaoyuanError(f"The server at {self._client.base_url} broke off: {error}.") from error

    def _write(self, kind: str, text: str) -> None:
        """Write a piece of the answer; thoughts are dim and end with a line break."""
        before = getattr(self, "_last", "end")
        if kind != before and before == "reasoning":
            sys.stdout.write("\n")
        self._last = kind
        sys.stdout.write(self._dim(text) if kind == "reasoning" else text)
        sys.stdout.flush()

    def _dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self._colour else text

    def _first_model(self) -> str:
        import httpx

        try:
            response = self._client.get("/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise LiaoyuanError(f"There is no OpenAI-compatible server at {self._client.base_url}: {error}.") from error


def _lines(interactive: bool) -> Iterator[str]:
    """Yield lines of standard input; Ctrl-C at the prompt, like the end of the input, ends the conversation."""
    while True:
        try:
            yield input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return


def _deltas(line: str) -> Iterator[tuple[str, str]]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise LiaoyuanError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        delta = choice["delta"]
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            yield "reasoning", thought
        if delta.get("content"):
            yield "content", delta["content"]


def _message(response: "httpx.Response") -> str:
    """Return what the server says is wrong."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"The server answered {response.status_code}."
