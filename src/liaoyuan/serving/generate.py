"""`/inference/v1/generate`: token ids in, token ids out, for reinforcement learning and whoever has his own tokenizer.

Every token comes with its log-probability and the version of the weights that made it.
"""

import base64
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from liaoyuan.inference import Event, PromptLogprobs, Request, SamplingParams
from liaoyuan.serving.adapters import ADAPTER
from liaoyuan.serving.caller import CALLER
from liaoyuan.serving.errors import ApiError, invalid
from liaoyuan.serving.generation import (
    EventStream,
    Served,
    engine_events,
    finite,
    first_and_rest,
    server_event,
    unless_gone,
)
from liaoyuan.serving.protocol import Body, Tokens
from liaoyuan.serving.sampling import SEEDS


class TokenSampling(Body):
    """`inference.SamplingParams`, as JSON."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: int | None = None
    stop_token_ids: Tokens = Field(default=[])
    ignore_eos: bool = False
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-1000, le=1000)]] = Field(default={})
    bad_words: list[Annotated[Tokens, Field(min_length=1)]] = Field(default=[])
    allowed_tokens: Tokens = Field(default=[])
    scored_tokens: Annotated[Tokens, Field(max_length=1000)] = Field(default=[])
    logprobs: Annotated[int, Field(ge=0, le=1000)] = 0
    prompt_logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    processed_logprobs: bool = False
    return_masks: bool = False


class GenerateRequest(Body):
    """Body of `/inference/v1/generate`."""

    token_ids: Annotated[Tokens, Field(min_length=1)]
    sampling_params: TokenSampling = TokenSampling()
    model: str | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout: Annotated[float, Field(gt=0)] | None = None
    stream: bool = False


def generate_routes(served: Served) -> APIRouter:
    """Return the router of this endpoint."""
    router = APIRouter()

    @router.post("/inference/v1/generate", response_model=None)
    async def generate(http: HttpRequest, body: GenerateRequest) -> Response:
        served.choose_model(body.model)
        request = _request(served, body)
        events = _watched(served, request)
        if body.stream:
            return EventStream(_stream(request.id, await first_and_rest(http, events)))
        return JSONResponse(await unless_gone(http, _whole(request, events)))

    return router


def _request(served: Served, body: GenerateRequest) -> Request:
    asked = body.sampling_params
    ends = () if asked.ignore_eos else served.stop_token_ids
    sampling = SamplingParams(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=secrets.randbelow(SEEDS) if asked.seed is None else asked.seed % SEEDS,
        stop_token_ids=(*ends, *asked.stop_token_ids),
        top_logprobs=asked.logprobs,
        min_tokens=asked.min_tokens,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=tuple((_token(token), bias) for token, bias in asked.logit_bias.items()),
        bad_words=tuple(map(tuple, asked.bad_words)),
        allowed_tokens=tuple(asked.allowed_tokens),
        scored_tokens=tuple(asked.scored_tokens),
        prompt_logprobs=asked.prompt_logprobs,
        processed_logprobs=asked.processed_logprobs,
        return_masks=asked.return_masks,
    )
    times = [time for time in (body.timeout, CALLER.get().time_left()) if time is not None]
    return Request(
        "gen-" + secrets.token_hex(12),
        tuple(body.token_ids),
        sampling,
        priority=body.priority,
        key=CALLER.get().key,
        salt=body.cache_salt,
        adapter=ADAPTER.get(),
        timeout=min(times) if times else None,
    )


def _token(name: str) -> int:
    if not name.isdecimal() or len(name) > 9:
        raise invalid(f"'logit_bias' must have token ids as names, not '{name[:40]}'.", "logit_bias")
    return int(name)


async def _whole(request: Request, events: AsyncIterator[Event]) -> dict[str, Any]:
    """Return the reply of all events together."""
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        told = [event async for event in events]
    choice: dict[str, Any] = {"index": 0, "finish_reason": told[-1].finish_reason}
    parts = [_fields(event) for event in told]
    for name in parts[0]:
        choice[name] = [value for part in parts for value in part[name]]
    prompt = next((event.prompt for event in told if event.prompt is not None), None)
    count = len(choice["token_ids"])
    usage = {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": count,
        "total_tokens": len(request.prompt) + count,
    }
    usage["prompt_tokens_details"] = {"cached_tokens": told[0].cached_tokens}  # type: ignore[assignment]
    return {"request_id": request.id, "choices": [choice], "prompt_logprobs": _prompt(prompt), "usage": usage}


async def _stream(name: Any, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                choice = {"index": 0, **_fields(event), "finish_reason": event.finish_reason}
                yield server_event({"request_id": name, "choices": [choice], "prompt_logprobs": _prompt(event.prompt)})
    except ApiError as error:
        yield server_event(error.body())
    yield "data: [DONE]\n\n"


async def _watched(served: Served, request: Request) -> AsyncIterator[Event]:
    """Yield the events of a request, and tell the metrics of them; see `engine_events` for what is raised."""
    async with contextlib.aclosing(engine_events(served, request)) as events:
        with served.metrics.watch(len(request.prompt)) as watch:
            async for event in events:
                watch.saw(event)
                if event.finish_reason:
                    watch.end(event.finish_reason)
                yield event


def _fields(event: Event) -> dict[str, list[Any]]:
    """Return what an event adds; masks are base64 of int32 words, the lowest bit first."""
    return {
        "token_ids": event.tokens,
        "logprobs": [finite(value) for value in event.logprobs],
        "top_logprobs": [[[token, finite(value)] for token, value in top] for top in event.top_logprobs],
        "versions": [event.version] * len(event.tokens),
        "masks": [base64.b64encode(np.ascontiguousarray(mask).tobytes()).decode() for mask in event.masks],
    }


def _prompt(scores: PromptLogprobs | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    top = [[[token, finite(value)] for token, value in row] for row in scores.top]
    return {"logprobs": [finite(value) for value in scores.logprobs], "top_logprobs": top}
