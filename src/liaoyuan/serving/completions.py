"""`/v1/completions`: text or token ids in, their continuation out, nothing interpreted."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from liaoyuan.serving.errors import ApiError, invalid, unsupported
from liaoyuan.serving.generation import (
    EventStream,
    Job,
    Served,
    collect,
    finite,
    first_and_rest,
    sampling_params,
    server_event,
    start,
)
from liaoyuan.serving.protocol import MAX_CHOICES, CompletionRequest
from liaoyuan.serving.scores import PromptScores
from liaoyuan.serving.text import Piece, ScoredToken

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_routes(served: Served) -> APIRouter:
    """Return the router of this endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
        served.check_model(body.model)
        prompts = await asyncio.to_thread(_prompts, served, body)  # a long one must not hold up the streams of others
        reply = _Reply(served, body, prompts, "cmpl-" + secrets.token_hex(12), int(time.time()))
        jobs = await asyncio.to_thread(_jobs, served, body, prompts)
        await reply.score_prompts()
        pieces = start(served, jobs)
        if body.stream:
            return EventStream(_stream(reply, await first_and_rest(http, pieces) if jobs else pieces))
        return JSONResponse(reply.whole(await collect(http, pieces, reply.count)))

    return router


def _prompts(served: Served, body: CompletionRequest) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise invalid("There must be at least one prompt.", "prompt")
    prompts = [_ids(served, each) for each in given]
    if not all(prompts):
        raise invalid("A prompt must have at least one token.", "prompt")
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise invalid(f"At most {MAX_CHOICES} answers (prompts times n) are given at once.", "n")
    return prompts


def _ids(served: Served, prompt: str | list[int]) -> tuple[int, ...]:
    """Return the ids of a prompt; text gets the special tokens that the model wants before it."""
    if isinstance(prompt, str):
        return tuple(served.tokenizer.encode(prompt, add_special_tokens=True))
    size = served.tokenizer.vocab_size
    if prompt and max(prompt) >= size:
        raise invalid(f"The prompt has the token {max(prompt)}, but the vocabulary has {size} tokens.", "prompt")
    return tuple(prompt)


def _jobs(served: Served, body: CompletionRequest, prompts: list[tuple[int, ...]]) -> list[Job]:
    """Return a job for each prompt and choice; none if only the prompts are wanted back."""
    most = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise invalid("'max_tokens' may be 0 only with 'echo'.", "max_tokens")
    if most == 0:
        return []
    return [
        Job(prompt, sampling_params(served, body, prompt, most, body.logprobs or 0, choice), body.stops())
        for prompt in prompts
        for choice in range(body.n or 1)
    ]


async def _stream(reply: "_Reply", pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
    """Yield server-sent events; an error in mid-stream is the last of them."""
    if reply.body.echo:
        for index in range(reply.count):
            only = None if reply.body.max_tokens != 0 else "length"
            yield server_event(reply.chunk(index, *reply.prompt_part(index), only))
    try:
        async for index, piece in pieces:
            text, scores = reply.part(index, [piece])
            if text or piece.tokens or piece.finish_reason or reply.body.running_usage:
                yield server_event(reply.chunk(index, text, scores, piece.finish_reason))
        if reply.body.include_usage:
            yield server_event({**reply.head(), "choices": [], "usage": reply.usage()})
    except ApiError as error:
        yield server_event(error.body())
    yield "data: [DONE]\n\n"


@dataclass
class _Reply:
    """The shape of one reply, whole or in chunks. Choice i belongs to prompt i // n."""

    served: Served
    body: CompletionRequest
    prompts: list[tuple[int, ...]]
    id: str
    created: int
    scores: dict[int, PromptScores] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)  # choice -> where its continuation begins in its text
    counts: dict[int, int] = field(default_factory=dict)  # choice -> tokens

    @property
    def count(self) -> int:
        return len(self.prompts) * (self.body.n or 1)

    async def score_prompts(self) -> None:
        """Fill `scores`, if the log-probabilities of the prompts are wanted."""
        if not self.body.echo or self.body.logprobs is None:
            return
        if self.served.scorer is None:
            raise unsupported("echo", "it does not score prompts; leave out 'echo' or 'logprobs'.")
        for index, prompt in enumerate(self.prompts):
            if max(map(len, self.prompts)) > self.served.context_length:
                raise invalid("A prompt is longer than the model's context.", "prompt", "context_length_exceeded")
            self.scores[index] = await asyncio.to_thread(self.served.scorer, prompt, self.body.logprobs)

    def whole(self, choices: list[list[Piece]]) -> dict[str, Any]:
        """Return the reply that is not streamed."""
        rows = []
        for index, pieces in enumerate(choices):
            prompt_text, prompt_scores = self.prompt_part(index) if self.body.echo else ("", None)
            text, scores = self.part(index, pieces)
            if prompt_scores and scores:
                scores = {name: prompt_scores[name] + scores[name] for name in scores}
            reason = pieces[-1].finish_reason if pieces else "length"
            rows.append(_choice(index, prompt_text + text, scores, reason))
        return {**self.head(), "choices": rows, "usage": self.usage()}

    def prompt_part(self, index: int) -> tuple[str, dict[str, Any] | None]:
        """Return the text of the prompt of a choice, and its log-probabilities if they are wanted."""
        number = index // (self.body.n or 1)
        prompt = self.prompts[number]
        given_text = self.body.prompt[number] if isinstance(self.body.prompt, list) else self.body.prompt
        text = given_text if isinstance(given_text, str) else self.served.tokenizer.decode(prompt)
        self.offsets[index] = len(text)
        if number not in self.scores:
            return text, None
        scores = self.scores[number]
        decoder, ends = self.served.decoder(), [0]
        for token in prompt:
            ends.append(ends[-1] + len(decoder.feed([token])))
        before = ends[-1] - len(text)  # SentencePiece puts a space before a text that is no part of it
        return text, {
            "tokens": [self._text(token) for token in prompt],
            "token_logprobs": [None, *map(finite, scores.logprobs)],
            "top_logprobs": [None, *map(self._rivals, scores.top, prompt[1:], scores.logprobs)],
            "text_offset": [max(0, end - before) for end in ends[:-1]],
        }

    def part(self, index: int, pieces: list[Piece]) -> tuple[str, dict[str, Any] | None]:
        """Return the text that pieces add to a choice, and their log-probabilities if they are wanted."""
        if pieces:
            self.counts[index] = pieces[-1].completion_tokens
        text = "".join(piece.content for piece in pieces)
        if self.body.logprobs is None:
            return text, None
        tokens: list[ScoredToken] = [token for piece in pieces for token in piece.tokens]
        return text, {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._rivals(token.top, token.id, token.logprob) for token in tokens],
            "text_offset": [self.offsets.get(index, 0) + token.start for token in tokens],
        }

    def chunk(self, index: int, text: str, scores: Any, finish_reason: str | None) -> dict[str, Any]:
        """Return one chunk of the stream."""
        chunk = {**self.head(), "choices": [_choice(index, text, scores, finish_reason)]}
        if self.body.running_usage:
            chunk["usage"] = self.usage()
        elif self.body.include_usage:
            chunk["usage"] = None
        return chunk

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}

    def usage(self) -> dict[str, Any]:
        prompt, completion = sum(map(len, self.prompts)), sum(self.counts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _rivals(self, top: list[tuple[int, float]], token: int, logprob: float) -> dict[str, float]:
        """Return the most probable tokens, and the chosen one if it is none of them (as OpenAI does)."""
        rivals = {self._text(rival): finite(score) for rival, score in top}
        return {**rivals, self._text(token): finite(logprob)}

    def _text(self, token: int) -> str:
        """Return a token as text; one that is no whole text by itself is shown by its bytes, as OpenAI does."""
        raw = self.served.tokenizer.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _choice(index: int, text: str, scores: Any, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": scores, "finish_reason": finish_reason}
