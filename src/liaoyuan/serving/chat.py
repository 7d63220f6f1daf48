"""`/v1/chat/completions`: a conversation in, the next message out, thoughts apart from content."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import PromptLogprobs
from liaoyuan.serving.caller import CALLER
from liaoyuan.serving.chat_body import ChatRequest
from liaoyuan.serving.conversation import chat_jobs, chat_prompt, prefilled
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import (
    EventStream,
    Served,
    collect,
    finite,
    first_and_rest,
    server_event,
    start,
    unless_gone,
)
from liaoyuan.serving.sampling import counted_logprobs
from liaoyuan.serving.scores import prompt_scores, score_rows, shown
from liaoyuan.serving.status import SYSTEM_FINGERPRINT
from liaoyuan.serving.text import Piece, ScoredToken
from liaoyuan.serving.timings import Timings
from liaoyuan.serving.tools import Call, CallPiece, whole_calls


def chat_routes(served: Served) -> APIRouter:
    """Return the router of this endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
        served.choose_model(body.model)
        body = counted_logprobs(served, prefilled(served, body))
        jobs = await asyncio.to_thread(chat_jobs, served, body)  # a long prompt must not hold up the streams of others
        scores = await unless_gone(http, _scores(served, body, jobs[0].prompt))
        pieces = start(served, jobs)
        id = "chatcmpl-" + (body.request_id or CALLER.get().id)
        reply = _Reply(served, body, jobs[0].prompt, scores, id, int(time.time()))
        if body.stream:
            return EventStream(_stream(reply, len(jobs), await first_and_rest(http, pieces)))
        return JSONResponse(reply.whole(await collect(http, pieces, len(jobs))))

    @router.post("/v1/chat/completions/input_tokens")
    async def input_tokens(body: ChatRequest) -> dict[str, int]:
        served.choose_model(body.model)
        body = prefilled(served, body)
        return {"input_tokens": len(await asyncio.to_thread(chat_prompt, served, body))}

    return router


async def _scores(served: Served, body: ChatRequest, prompt: tuple[int, ...]) -> PromptLogprobs | None:
    """Return the log-probabilities of the prompt if they are wanted."""
    return None if body.prompt_logprobs is None else await prompt_scores(served, prompt, body.prompt_logprobs)


async def _stream(reply: "_Reply", count: int, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
    """Yield server-sent events; an error in mid-stream is the last of them."""
    for index in range(count):
        for chunk in reply.first_chunks(index):
            yield server_event(chunk)
    try:
        async for index, piece in pieces:
            for chunk in reply.chunks(index, piece):
                yield server_event(chunk)
        if reply.body.include_usage:
            yield server_event(reply.usage_chunk())
    except ApiError as error:
        yield server_event(error.body())
    yield "data: [DONE]\n\n"


@dataclass
class _Reply:
    """The shape of one reply, whole or in chunks."""

    served: Served
    body: ChatRequest
    prompt: tuple[int, ...]
    scores: PromptLogprobs | None
    id: str
    created: int

    def __post_init__(self) -> None:
        self._timings, self._last = Timings(len(self.prompt)), Piece("", "", [], 0, 0, None)
        self._cached = 0  # tokens of the prompt that were found in the prefix cache
        self._counts: dict[int, tuple[int, int]] = {}  # choice -> (completion tokens, reasoning tokens)

    def whole(self, choices: list[list[Piece]]) -> dict[str, Any]:
        """Return the reply that is not streamed."""
        return {
            **self._head("chat.completion"),
            **self._prompt_ids(),
            "choices": [self._choice(index, pieces) for index, pieces in enumerate(choices)],
            "usage": self._usage(),
            "prompt_logprobs": self._prompt_logprobs(),
            **self._verbose(),
            **self._metrics(),
        }

    def first_chunks(self, index: int) -> Iterable[dict[str, Any]]:
        """Yield the chunk that says who speaks, and what the answer goes on from if that is wanted back."""
        yield self.chunk(index, {"role": "assistant", "content": None}) | self._prompt_ids()
        if self.body.echoed:
            yield self.chunk(index, {"content": self.body.echoed})

    def _prompt_logprobs(self) -> Any:
        if self.scores is None:
            return None
        tokenizer = self.served.tokenizer
        return score_rows(
            self.prompt, self.scores, self.body.prompt_logprobs or 0, lambda token: shown(tokenizer, token)
        )

    def _verbose(self) -> dict[str, Any]:
        wanted = self.served.settings.verbose if self.body.verbose is None else self.body.verbose
        if not wanted:
            return {}
        return {"__verbose": {"prompt": self.served.tokenizer.decode(self.prompt, skip_special=False)}}

    def _metrics(self) -> dict[str, Any]:
        return {"metrics": self._timings.metrics(self._last)} if self.served.settings.timings else {}

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt} if self.body.return_token_ids else {}

    def _ids(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return the ids of pieces, the one that ended the answer included, if they are wanted."""
        if not self.body.return_token_ids:
            return {}
        return {"token_ids": [token.id for piece in pieces for token in piece.generated]}

    def chunks(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        """Yield the chunks that say one piece: what it adds, then why it ended."""
        self._count(index, piece)
        if piece.read is not None:
            if index == 0:  # of several answers to one prompt the first one tells
                yield self._timed(self.chunk(0, {}) | {"prompt_progress": self._timings.progress(piece)})
            return
        delta: dict[str, Any] = {}
        if piece.reasoning and self.body.include_reasoning is not False:
            delta["reasoning"] = delta["reasoning_content"] = piece.reasoning
        if piece.content:
            delta["content"] = piece.content
        delta |= self._called_delta(piece)
        scores = self._logprobs(piece.tokens)
        ids = self._ids([piece])
        whole = self.body.running_usage  # a chunk without a token would say the usage of the one before it again
        if delta or (piece.tokens and self.body.logprobs) or ids or whole:
            yield self._timed(self.chunk(index, delta, scores, self._reason(piece) if whole else None, ids))
        if piece.finish_reason and not whole:
            yield self._timed(self.chunk(index, {}, None, self._reason(piece)))

    def _called_delta(self, piece: Piece) -> dict[str, Any]:
        """Return what a piece adds to tool calls: the name first, then text of the arguments."""
        if not piece.calls:
            return {}
        if self._old:
            name, text = ("".join(getattr(call, part) for call in piece.calls) for part in ("name", "arguments"))
            return {"function_call": {"name": name, "arguments": text} if name else {"arguments": text}}
        return {"tool_calls": [_call_delta(call) for call in piece.calls]}

    @property
    def _old(self) -> bool:
        """Whether calls are asked for by the names that they had at first: `functions`, `function_call`."""
        return bool(self.body.functions and not self.body.tools)

    def _reason(self, piece: Piece) -> str | None:
        return "function_call" if self._old and piece.finish_reason == "tool_calls" else piece.finish_reason

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Any = None,
        finish_reason: str | None = None,
        ids: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return one chunk of the stream."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **(ids or {})}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.body.running_usage:
            chunk["usage"] = self._usage()
        elif self.body.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        usage = {"choices": [], "usage": self._usage(), **self._metrics()}
        return self._timed({**self._head("chat.completion.chunk"), **usage})

    def _timed(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Return a chunk with the times so far if they are wanted."""
        return {**chunk, "timings": self._timings.values(self._last)} if self.body.timings_per_token else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.served.answering}
        return {**head, "system_fingerprint": SYSTEM_FINGERPRINT}

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        for piece in pieces:
            self._count(index, piece)
        content = self.body.echoed + "".join(piece.content for piece in pieces)
        calls = whole_calls(call for piece in pieces for call in piece.calls)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if calls else ""),
            "refusal": None,
        }
        if calls and self._old:
            message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
        elif calls:
            message["tool_calls"] = [_whole_call(call) for call in calls]
        reasoning = "".join(piece.reasoning for piece in pieces)
        shown = self.body.include_reasoning is not False
        message["reasoning"] = message["reasoning_content"] = (reasoning or None) if shown else None
        scores = self._logprobs([token for piece in pieces for token in piece.tokens])
        return {
            "index": index,
            "message": message,
            "logprobs": scores,
            "finish_reason": self._reason(pieces[-1]),
            **self._ids(pieces),
        }

    def _count(self, index: int, piece: Piece) -> None:
        self._counts[index] = (piece.completion_tokens, piece.reasoning_tokens)
        self._cached = max(self._cached, piece.cached_tokens)
        self._last = piece
        self._timings.saw(piece)

    def _usage(self) -> dict[str, Any]:
        completion = sum(tokens for tokens, _ in self._counts.values())
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": completion,
            "total_tokens": len(self.prompt) + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
            "completion_tokens_details": {"reasoning_tokens": sum(tokens for _, tokens in self._counts.values())},
        }

    def _logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        by_id = bool(self.body.return_tokens_as_token_ids)
        return {"content": [scored_token(self.served.tokenizer, token, by_id) for token in tokens], "refusal": None}


def scored_token(tokenizer: Tokenizer, token: ScoredToken, by_id: bool = False) -> dict[str, Any]:
    """Return a token with its log-probability and its rivals, as OpenAI shows them; by_id: named by their numbers."""
    rivals = [token_values(tokenizer, rival, logprob, by_id) for rival, logprob in token.top]
    return {**token_values(tokenizer, token.id, token.logprob, by_id), "top_logprobs": rivals}


def token_values(tokenizer: Tokenizer, token: int, logprob: float, by_id: bool = False) -> dict[str, Any]:
    """Return a token as text (or as vLLM names it by its number), its log-probability and its bytes."""
    raw = tokenizer.token_bytes(token)
    name = f"token_id:{token}" if by_id else raw.decode("utf-8", "replace")
    return {"token": name, "logprob": finite(logprob), "bytes": list(raw)}


def _whole_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(call: CallPiece) -> dict[str, Any]:
    """Return a piece of a call as OpenAI streams it: id, type and name are said once."""
    function = {"name": call.name, "arguments": call.arguments} if call.name else {"arguments": call.arguments}
    head = {"id": call.id, "type": "function"} if call.name else {}
    return {"index": call.index, **head, "function": function}
