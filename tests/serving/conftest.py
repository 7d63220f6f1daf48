"""A tokenizer and a tiny random model with a chat template, a runner that says what it is told, and real servers."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from liaoyuan.checkpoint import save_model
from liaoyuan.data.tokenizer import Tokenizer, train_tokenizer
from liaoyuan.inference import Busy, Event, Request
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.serving import About, Server, build_app

TEXT = (
    "What is 17 + 25? First 7 + 5 = 12, write 2 carry 1. Then 1 + 2 + 1 = 4. The answer is 42. 十七加二十五等于四十二。"
)
CONTEXT = 256


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 20, 330)


@pytest.fixture(scope="session")
def model_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model, as training would have written it."""
    config = ModelConfig("qwen3", tokenizer.vocab_size, 32, 64, 2, 4, 2, 8, CONTEXT, qk_norm=True)
    tokenizer_folder, folder = (tmp_path_factory.mktemp(name) for name in ("tokenizer", "tiny"))
    tokenizer.save(tokenizer_folder)
    save_model(initialise(Decoder(config), 0), folder, tokenizer_folder)
    return folder


class ScriptedRunner:
    """A runner that answers each request with the tokens that `script` says; `open` counts the unfinished ones."""

    def __init__(self, script: Callable[[Request], list[int]], pace: float = 0.0) -> None:
        self._script, self._pace = script, pace
        self.requests: list[Request] = []
        self.open = self.aborted = 0
        self.busy, self.failure = False, ""

    def stream(self, request: Request) -> AsyncIterator[Event]:
        if self.busy:
            raise Busy("The server is busy: 1 request is open.")
        self.requests.append(request)
        return self._stream(request)

    async def _stream(self, request: Request) -> AsyncIterator[Event]:
        from liaoyuan.errors import LiaoyuanError

        self.open += 1
        ended = False
        try:
            tokens = self._script(request)[: request.sampling.max_tokens]
            for place, token in enumerate(tokens):
                await asyncio.sleep(self._pace)
                stop = token in request.sampling.stop_token_ids
                ended = stop or place == len(tokens) - 1
                reason = "stop" if stop else "length" if ended else None
                top = [[(token, -0.5), (0, -2.0)][: request.sampling.top_logprobs]]
                yield Event(request.id, [token], [-0.5], reason, top if request.sampling.top_logprobs else [])
                if self.failure and place == 2:
                    raise LiaoyuanError(self.failure)
                if ended:
                    return
        finally:
            self.open -= 1
            self.aborted += not ended

    def rouse(self) -> None: ...

    def health(self) -> dict[str, Any]:
        return {"alive": True, "open": self.open}


def chat_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of an answer that is written with its marks, and the end of the turn."""
    ids: list[int] = []
    for part in text.replace("</think>", "\0</think>\0").split("\0"):
        ids += [tokenizer.think_ids[1]] if part == "</think>" else tokenizer.encode(part)
    return [*ids, tokenizer.eos_ids[0]]


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of the loopback; yield its address."""
    bound = socket.create_server(("127.0.0.1", 0))
    with Server(app, bound, contextlib.ExitStack()) as server:
        yield server.url


@contextlib.contextmanager
def scripted(
    tokenizer: Tokenizer, answer: str, pace: float = 0.0, about: About = About()
) -> Iterator[tuple[str, ScriptedRunner]]:
    """Serve a model that always gives this answer; yield its address and its runner."""
    runner = ScriptedRunner(lambda request: chat_tokens(tokenizer, answer), pace)
    with serving(build_app(runner, tokenizer, "scripted", 4096, about)) as url:
        yield url, runner
