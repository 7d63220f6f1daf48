"""`/v1/embeddings`, `/rerank` and `/score`: texts as vectors, and how near they are to each other.

The engine's thread computes them between two steps, so many tokens at a time as a step has, so that the answers of
others go on (`inference.operations.Embed`).
"""

import asyncio
import base64
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from torch import Tensor

from liaoyuan.inference import Pooling
from liaoyuan.inference.operations import Embed
from liaoyuan.serving.chat_body import ChatRequest
from liaoyuan.serving.conversation import chat_prompt
from liaoyuan.serving.embeddings_body import (
    Document,
    EmbeddingRequest,
    Parts,
    PromptString,
    RerankRequest,
    ScoreRequest,
)
from liaoyuan.serving.errors import invalid
from liaoyuan.serving.generation import Served, asked_of_engine, prompt_ids, truncated, unless_gone
from liaoyuan.serving.protocol import TruncationSide as Side


def embedding_routes(served: Served, pooling: Pooling) -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()
    embedder = _Embedder(served, pooling)

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings(http: HttpRequest, body: EmbeddingRequest) -> dict[str, Any] | list[dict[str, Any]]:
        served.check_model(body.model)
        if pooling.mode == "none":
            return await _of_tokens(http, served, embedder, body)
        texts = await asyncio.to_thread(_inputs, served, body)
        unit = body.use_activation is not False
        vectors = _shortened(await unless_gone(http, embedder.embed(texts, unit)), body.dimensions, unit)
        rows = [_row(index, vector, body) for index, vector in enumerate(vectors)]
        head = {"id": "embd-" + secrets.token_hex(12), "object": "list", "created": int(time.time())}
        return {**head, "data": rows, "model": served.name, "usage": _usage(texts)}

    @router.post("/v2/rerank", response_model=None)
    @router.post("/v1/rerank", response_model=None)
    @router.post("/rerank", response_model=None)
    async def rerank(http: HttpRequest, body: RerankRequest) -> dict[str, Any] | list[dict[str, Any]]:
        served.check_model(body.model)
        ids = await asyncio.to_thread(_ids, served, [body.query, *body.ranked], body.truncation, body.side)
        query, *vectors = await unless_gone(http, embedder.embed(ids))
        scores = [_similarity(query, vector) for vector in vectors]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        if body.texts is not None:
            return [_tei_result(body, index, scores[index]) for index in best]
        results = [_result(body, index, scores[index]) for index in best]
        head = {"id": "rerank-" + secrets.token_hex(12), "model": served.name}
        return {**head, "results": results, "usage": _usage(ids)}

    @router.post("/v1/score")
    @router.post("/score")
    async def score(http: HttpRequest, body: ScoreRequest) -> dict[str, Any]:
        served.check_model(body.model)
        first, second = _pairs(body)
        side = body.truncation_side or "left"
        texts = await asyncio.to_thread(_ids, served, [*first, *second], body.truncate_prompt_tokens, side)
        vectors = await unless_gone(http, embedder.embed(texts))
        left, right = vectors[: len(first)] * (len(second) // len(first)), vectors[len(first) :]
        scores = [_similarity(one, other) for one, other in zip(left, right, strict=True)]
        rows = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        head = {"id": "score-" + secrets.token_hex(12), "object": "list", "created": int(time.time())}
        return {**head, "model": served.name, "data": rows, "usage": _usage(texts)}

    return router


async def _of_tokens(
    http: HttpRequest, served: Served, embedder: "_Embedder", body: EmbeddingRequest
) -> list[dict[str, Any]]:
    """Return the embeddings of each token of each text, as llama.cpp gives them: OpenAI's shape has no place for it."""
    if http.url.path.startswith("/v1/"):
        message = (
            "This server embeds single tokens (pooling=none), for which OpenAI's API has no shape: ask /embeddings."
        )
        raise invalid(message)
    texts = await asyncio.to_thread(_inputs, served, body)
    vectors = await unless_gone(http, embedder.embed(texts, unit=False))
    return [{"index": index, "embedding": vector.tolist()} for index, vector in enumerate(vectors)]


class _Embedder:
    """Embeds the texts of one request after those of another, so that long ones do not fill the memory together."""

    def __init__(self, served: Served, pooling: Pooling) -> None:
        self._served, self._pooling = served, pooling
        self._turn = asyncio.Lock()

    async def embed(self, texts: Sequence[Sequence[int]], unit: bool = True) -> list[Tensor]:
        """Return the embedding of each text, fp32 [H], of length 1 if `unit` (of each token, [tokens, H]).

        Raises:
            ApiError: the engine is not ready, or time is up.
        """
        if unit and self._pooling.mode == "none":
            raise invalid("This server embeds single tokens (pooling=none), not texts.")
        async with self._turn:
            self._served.metrics.spent.embedded += sum(map(len, texts))
            self._served.metrics.spent.embeddings += 1
            asked = Embed([list(text) for text in texts], self._pooling.mode)
            rows = [torch.tensor(row) for row in await asked_of_engine(self._served, asked)]
        return [_unit(row) if unit else row for row in rows]


def _inputs(served: Served, body: EmbeddingRequest) -> list[tuple[int, ...]]:
    """Return the ids of each text of a request, or of its conversation."""
    given: Any = body.input
    if body.messages is not None:
        given = [list(_conversation(served, body))]
    elif not isinstance(given, list):
        given = [given]
    elif any(isinstance(part, int) for part in given):
        if not all(isinstance(part, int | str) for part in given):
            raise invalid("'input' is either one list of tokens (and texts), or a list of whole inputs.", "input")
        given = [given]
    texts = [_plain(served, each, body.add_special_tokens is not False) for each in given]
    return _ids(served, texts, body.truncate_prompt_tokens, body.truncation_side or "left", "input")


def _conversation(served: Served, body: EmbeddingRequest) -> tuple[int, ...]:
    assert body.messages is not None
    asked = ChatRequest(
        messages=body.messages,
        chat_template_kwargs=body.chat_template_kwargs,
        continue_final_message=body.continue_final_message,
        add_generation_prompt=body.add_generation_prompt,
    )
    return chat_prompt(served, asked, bool(body.add_generation_prompt))


def _plain(served: Served, given: Any, special: bool) -> str | list[int]:
    """Return a text, or the tokens of one that has no special tokens or mixes tokens with texts."""
    if isinstance(given, PromptString):
        given = given.prompt_string
    elif isinstance(given, Parts):
        given = "".join(part.text for part in given.content)
    if isinstance(given, str):
        return given if special else served.tokenizer.encode(given)
    ids: list[int] = []
    for part in given:
        ids += (
            [part] if isinstance(part, int) else served.tokenizer.encode(part, add_special_tokens=special and not ids)
        )
    return ids


def _ids(
    served: Served,
    texts: Sequence[str | list[int]],
    truncation: int | None,
    side: Side = "left",
    param: str = "documents",
) -> list[tuple[int, ...]]:
    """Return the ids of each text."""
    if not texts:
        raise invalid("There must be at least one text.", param)
    most = served.context_length
    if truncation is not None and truncation > most:
        message = f"'truncate_prompt_tokens' is {truncation}, but this model's context is {most} tokens."
        raise invalid(f"{message} Please request a smaller truncation size.", "truncate_prompt_tokens")
    found = [truncated(prompt_ids(served, text, param), truncation, most, side) for text in texts]
    longest = max(map(len, found))
    if not all(found):
        raise invalid("A text must have at least one token.", param)
    if longest > most:
        message = f"A text is too large: it has {longest} tokens, but this model's context is {most} tokens."
        remedy = "Please reduce the length of the input prompt, or set 'truncate_prompt_tokens'."
        raise invalid(f"{message} {remedy}", param, "context_length_exceeded")
    return found


def _pairs(body: ScoreRequest) -> tuple[list[str], list[str]]:
    """Return the left and the right texts; the left ones may be one for all."""
    first, second = (
        [_text(each) for each in given] if isinstance(given, list) else [given] for given in (body.text_1, body.text_2)
    )
    if len(first) not in (1, len(second)):
        message = f"'text_1' has {len(first)} texts and 'text_2' {len(second)}; it must be one, or as many."
        raise invalid(message, "text_1")
    return first, second


def _text(document: str | Document) -> str:
    return document if isinstance(document, str) else document.text


def _result(body: RerankRequest, index: int, score: float) -> dict[str, Any]:
    """Return a place of a ranking as Jina and Cohere give it."""
    document = {} if body.return_documents is False else {"document": {"text": body.ranked[index]}}
    return {"index": index, "relevance_score": score, **document}


def _tei_result(body: RerankRequest, index: int, score: float) -> dict[str, Any]:
    """Return a place of a ranking as TEI gives it."""
    text = {"text": body.ranked[index]} if body.return_text else {}
    return {"index": index, "score": score, **text}


def _shortened(vectors: list[Tensor], dimensions: int | None, unit: bool) -> list[Tensor]:
    """Keep the first numbers of each vector, and make its length 1 again (Kusupati et al. 2022, arXiv 2205.13147)."""
    if dimensions is None:
        return vectors
    if dimensions > len(vectors[0]):
        raise invalid(f"This model's embeddings have {len(vectors[0])} dimensions.", "dimensions")
    return [_unit(vector[:dimensions]) if unit else vector[:dimensions] for vector in vectors]


def _row(index: int, vector: Tensor, body: EmbeddingRequest) -> dict[str, Any]:
    value = base64.b64encode(_bytes(vector, body)).decode() if body.encoding_format == "base64" else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": value}


def _bytes(vector: Tensor, body: EmbeddingRequest) -> bytes:
    """Return the bytes of an embedding in the number format that a request asks for."""
    kept = vector.to(getattr(torch, body.embed_dtype or "float32"))
    words = kept.view(torch.int32 if kept.itemsize == 4 else torch.int16).numpy()
    big = body.endianness == "big" or (body.endianness == "native" and sys.byteorder == "big")
    return words.astype(words.dtype.newbyteorder(">" if big else "<")).tobytes()


def _unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector, dim=0)


def _similarity(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two vectors of length 1."""
    return float(one @ other)


def _usage(texts: Sequence[Sequence[int]]) -> dict[str, int]:
    count = sum(map(len, texts))
    return {"prompt_tokens": count, "total_tokens": count}
