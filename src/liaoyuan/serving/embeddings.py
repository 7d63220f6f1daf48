"""`/v1/embeddings`, `/rerank` and `/score`: texts as vectors, and how near they are to each other.

The engine's thread computes them between two steps, so many tokens at a time as a step has, so that the answers of
others go on.
"""

import asyncio
import base64
import functools
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from torch import Tensor

from liaoyuan.inference import Engine, Pooling, embedding_steps
from liaoyuan.inference.pooling import Step
from liaoyuan.serving.errors import invalid
from liaoyuan.serving.generation import Served, between_steps, prompt_ids, truncated, unless_gone
from liaoyuan.serving.protocol import Document, EmbeddingRequest, RerankRequest, ScoreRequest


def embedding_routes(served: Served, pooling: Pooling) -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()
    embedder = _Embedder(served, pooling)

    @router.post("/v1/embeddings")
    async def embeddings(http: HttpRequest, body: EmbeddingRequest) -> dict[str, Any]:
        served.check_model(body.model)
        texts = await asyncio.to_thread(_inputs, served, body)
        vectors = _shortened(await unless_gone(http, embedder.embed(texts)), body.dimensions)
        rows = [_row(index, vector, body.encoding_format or "float") for index, vector in enumerate(vectors)]
        return {"object": "list", "data": rows, "model": served.name, "usage": _usage(texts)}

    @router.post("/v2/rerank")
    @router.post("/v1/rerank")
    @router.post("/rerank")
    async def rerank(http: HttpRequest, body: RerankRequest) -> dict[str, Any]:
        served.check_model(body.model)
        documents = [_text(document) for document in body.documents]
        texts = await asyncio.to_thread(_ids, served, [body.query, *documents], body.truncate_prompt_tokens)
        query, *vectors = await unless_gone(http, embedder.embed(texts))
        scores = [_similarity(query, vector) for vector in vectors]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
        if body.return_documents is not False:
            results = [{**result, "document": {"text": documents[result["index"]]}} for result in results]
        return {
            "id": "rerank-" + secrets.token_hex(12),
            "model": served.name,
            "results": results,
            "usage": _usage(texts),
        }

    @router.post("/v1/score")
    @router.post("/score")
    async def score(http: HttpRequest, body: ScoreRequest) -> dict[str, Any]:
        served.check_model(body.model)
        first, second = _pairs(body)
        texts = await asyncio.to_thread(_ids, served, [*first, *second], body.truncate_prompt_tokens)
        vectors = await unless_gone(http, embedder.embed(texts))
        left, right = vectors[: len(first)] * (len(second) // len(first)), vectors[len(first) :]
        scores = [_similarity(one, other) for one, other in zip(left, right, strict=True)]
        rows = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        head = {"id": "score-" + secrets.token_hex(12), "object": "list", "created": int(time.time())}
        return {**head, "model": served.name, "data": rows, "usage": _usage(texts)}

    return router


class _Embedder:
    """Embeds the texts of one request after those of another, so that long ones do not fill the memory together."""

    def __init__(self, served: Served, pooling: Pooling) -> None:
        self._served, self._pooling = served, pooling
        self._turn = asyncio.Lock()

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the embedding of each text, fp32 [H]. Raises ApiError if the engine is not ready or time is up."""
        found: dict[int, Tensor] = {}
        async with self._turn:
            most = await between_steps(self._served, lambda engine: engine.config.max_batch_tokens)
            for step in embedding_steps(texts, self._pooling, most):
                found.update(await between_steps(self._served, functools.partial(_on_model, step)))
        return [found[number] for number in range(len(texts))]


def _on_model(step: Step, engine: Engine) -> list[tuple[int, Tensor]]:
    return step(engine.model, engine.memory)


def _inputs(served: Served, body: EmbeddingRequest) -> list[tuple[int, ...]]:
    given: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    if given and isinstance(given[0], int):
        given = [given]
    return _ids(served, given, body.truncate_prompt_tokens, "input")


def _ids(
    served: Served, texts: Sequence[str | list[int]], truncation: int | None, param: str = "documents"
) -> list[tuple[int, ...]]:
    """Return the ids of each text."""
    if not texts:
        raise invalid("There must be at least one text.", param)
    found = [truncated(prompt_ids(served, text, param), truncation, served.context_length) for text in texts]
    longest = max(map(len, found))
    if not all(found):
        raise invalid("A text must have at least one token.", param)
    if longest > served.context_length:
        message = f"A text has {longest} tokens, but this model's context is {served.context_length} tokens."
        raise invalid(message, param, "context_length_exceeded")
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


def _shortened(vectors: list[Tensor], dimensions: int | None) -> list[Tensor]:
    """Keep the first numbers of each vector, and make its length 1 again (Kusupati et al. 2022, arXiv 2205.13147)."""
    if dimensions is None:
        return vectors
    if dimensions > len(vectors[0]):
        raise invalid(f"This model's embeddings have {len(vectors[0])} dimensions.", "dimensions")
    return [torch.nn.functional.normalize(vector[:dimensions], dim=0) for vector in vectors]


def _row(index: int, vector: Tensor, encoding: Literal["float", "base64"]) -> dict[str, Any]:
    raw = vector.numpy().astype("<f4")
    value = base64.b64encode(raw.tobytes()).decode() if encoding == "base64" else raw.tolist()
    return {"object": "embedding", "index": index, "embedding": value}


def _similarity(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two vectors of length 1."""
    return float(one @ other)


def _usage(texts: Sequence[Sequence[int]]) -> dict[str, int]:
    count = sum(map(len, texts))
    return {"prompt_tokens": count, "total_tokens": count}
