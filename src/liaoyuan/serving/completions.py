"""`/v1/completions`: text or token ids in, their continuation out, nothing interpreted."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from liaoyuan.inference import PromptLogprobs
from liaoyuan.serving.beams import beam_search, check_beams
from liaoyuan.serving.completion_body import USUAL_PENALTY, CompletionRequest
from liaoyuan.serving.completion_reply import CompletionReply
from liaoyuan.serving.errors import ApiError, invalid
from liaoyuan.serving.generation import (
    EventStream,
    Job,
    Served,
    collect,
    first_and_rest,
    prompt_ids,
    server_event,
    start,
    truncated,
    unless_gone,
)
from liaoyuan.serving.infill import fill_prompt, fill_tokens
from liaoyuan.serving.protocol import MAX_CHOICES
from liaoyuan.serving.sampling import counted_logprobs, sampling_params
from liaoyuan.serving.scores import prompt_scores
from liaoyuan.serving.text import Piece

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_routes(served: Served) -> APIRouter:
    """Return the router of this endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
        served.choose_model(body.model)
        body = counted_logprobs(served, body)
        prompts = await asyncio.to_thread(_prompts, served, body)  # a long one must not hold up the streams of others
        jobs = await asyncio.to_thread(_jobs, served, body, prompts)
        reply = CompletionReply(served, body, prompts, await unless_gone(http, _scores(served, body, prompts)))
        if body.use_beam_search and jobs:
            return JSONResponse(reply.whole(await unless_gone(http, _beams(served, body, jobs))))
        pieces = start(served, jobs)
        if body.stream:
            return EventStream(_stream(reply, await first_and_rest(http, pieces) if jobs else pieces))
        return JSONResponse(reply.whole(await collect(http, pieces, len(prompts) * body.candidates)))

    return router


async def _beams(served: Served, body: CompletionRequest, jobs: list[Job]) -> list[list[Piece]]:
    """Return the most probable answers to each prompt."""
    penalty = USUAL_PENALTY if body.length_penalty is None else body.length_penalty
    found = [await beam_search(served, job, body.choices, penalty) for job in jobs[:: body.choices]]
    return [pieces for answers in found for pieces in answers]


def _prompts(served: Served, body: CompletionRequest) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise invalid("There must be at least one prompt.", "prompt")
    room = served.context_length - _most(body)
    truncation, side = body.truncate_prompt_tokens, body.truncation_side or "left"
    if body.suffix:
        prompts = [_filling(served, body, each) for each in given]
    else:
        prompts = [truncated(prompt_ids(served, each), truncation, room, side) for each in given]
    if not all(prompts):
        raise invalid("A prompt must have at least one token.", "prompt")
    if len(prompts) * body.candidates > MAX_CHOICES:
        name = "n" if body.candidates == body.choices else "best_of"
        raise invalid(f"At most {MAX_CHOICES} answers (prompts times {name}) are made at once.", name)
    return prompts


def _filling(served: Served, body: CompletionRequest, prompt: Any) -> tuple[int, ...]:
    """Return the ids after which a model writes what belongs between a prompt and the suffix."""
    tokens = fill_tokens(served.tokenizer, "suffix")
    if not isinstance(prompt, str):
        raise invalid("With 'suffix', the prompt must be a text.", "prompt")
    for name in ("echo", "truncate_prompt_tokens"):  # what is far from the gap goes away if there is too much of it
        if getattr(body, name):
            raise invalid(f"'{name}' is not for a prompt with a suffix.", name)
    return fill_prompt(served, tokens, prompt, body.suffix or "", most=_most(body))


def _jobs(served: Served, body: CompletionRequest, prompts: list[tuple[int, ...]]) -> list[Job]:
    """Return a job for each prompt and candidate; none if only the prompts are wanted back."""
    most = _most(body)
    scored = body.prompt_logprobs is not None
    if most == 0 and not body.echo and not scored:
        raise invalid("'max_tokens' may be 0 only with 'echo' or 'prompt_logprobs'.", "max_tokens")
    if body.logprob_token_ids and body.logprobs is None:
        raise invalid("'logprob_token_ids' needs 'logprobs'.", "logprob_token_ids")
    if scored and body.stream:
        raise invalid("'prompt_logprobs' cannot be streamed.", "prompt_logprobs")
    if most == 0:
        return []
    if body.use_beam_search:
        check_beams(body)
    if body.suffix:
        ends = [*(body.stop_token_ids or []), *fill_tokens(served.tokenizer, "suffix").stops]
        body = body.model_copy(update={"stop_token_ids": ends})
    stops, priority, salt = body.stops(), body.priority or 0, body.cache_salt or ""
    return [
        Job(
            prompt,
            sampling_params(served, body, prompt, most, body.logprobs or 0, choice),
            stops,
            priority=priority,
            salt=salt,
            continuing=True,
        )
        for prompt in prompts
        for choice in range(body.candidates)
    ]


def _most(body: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens


async def _scores(served: Served, body: CompletionRequest, prompts: list[tuple[int, ...]]) -> list[PromptLogprobs]:
    """Return the log-probabilities of each prompt; none if they are not wanted."""
    echoed = bool(body.echo) and body.logprobs is not None
    if not echoed and body.prompt_logprobs is None:
        return []
    if max(map(len, prompts)) > served.context_length:
        raise invalid("A prompt is longer than the model's context.", "prompt", "context_length_exceeded")
    top = max((body.logprobs or 0) if echoed else 0, body.prompt_logprobs or 0)
    return [await prompt_scores(served, prompt, top) for prompt in prompts]


async def _stream(reply: CompletionReply, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
    """Yield server-sent events; an error in mid-stream is the last of them."""
    for chunk in reply.first_chunks():
        yield server_event(chunk)
    try:
        async for index, piece in pieces:
            for chunk in reply.chunks(index, piece):
                yield server_event(chunk)
        if reply.body.include_usage:
            yield server_event({**reply.head(), "choices": [], "usage": reply.usage()})
    except ApiError as error:
        yield server_event(error.body())
    yield "data: [DONE]\n\n"
