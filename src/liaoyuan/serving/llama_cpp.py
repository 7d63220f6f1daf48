"""`/completion`, `/infill` and `/apply-template`: llama.cpp's own paths, for the clients that speak them."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from liaoyuan.serving.chat import token_values
from liaoyuan.serving.chat_body import ChatRequest
from liaoyuan.serving.conversation import chat_text
from liaoyuan.serving.errors import ApiError, invalid
from liaoyuan.serving.generation import (
    EventStream,
    Job,
    Served,
    collect,
    first_and_rest,
    server_event,
    start,
)
from liaoyuan.serving.infill import Extra, fill_prompt, fill_tokens
from liaoyuan.serving.protocol import MAX_CHOICES, Body, Sampling, Text, known_fields, renamed
from liaoyuan.serving.sampling import sampling_params
from liaoyuan.serving.text import Piece, ScoredToken
from liaoyuan.serving.timings import Timings

IGNORED = {
    "backend_sampling",
    "cache_prompt",
    "id_slot",
    "n_keep",
    "samplers",
    "t_max_predict_ms",
}
STOP_TYPES = {"stop": "eos", "length": "limit", "timeout": "limit"}
NEVER = -100.0  # a bias that keeps a token out


class NativeCompletion(Sampling):
    """Body of `/completion`; what llama.cpp only names otherwise has OpenAI's name here."""

    prompt: Any
    logit_bias: Any = None  # with texts as well as tokens
    n_probs: Annotated[int, Field(ge=0, le=1000)] | None = None
    post_sampling_probs: bool | None = None
    return_tokens: bool | None = None
    response_fields: list[str] | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        named = renamed(values)
        for name in ("max_tokens", "seed"):  # -1: no limit, any seed
            if named.get(name) == -1:
                del named[name]
        return known_fields(named, cls.model_fields, IGNORED, {})


class ExtraFile(Body):
    """Another file that the model should know."""

    text: Text
    filename: Text = "file"


class InfillRequest(NativeCompletion):
    """Body of `/infill`: what belongs between two texts. prompt: how it begins. input_extra: other files."""

    input_prefix: Text
    input_suffix: Text
    prompt: Text = ""
    input_extra: list[ExtraFile] = Field(default=[])


def llama_routes(served: Served) -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()

    @router.post("/completions", response_model=None)  # not OpenAI's, as long as it lacks /v1
    @router.post("/completion", response_model=None)
    async def completion(http: HttpRequest, body: NativeCompletion) -> Response:
        served.choose_model(body.model)
        return await answer(http, body)

    async def answer(http: HttpRequest, body: NativeCompletion) -> Response:
        jobs = await asyncio.to_thread(_jobs, served, body)  # a long prompt must not hold up the streams of others
        pieces, begun = start(served, jobs), time.monotonic()
        replies = [_Reply(served, body, job, index, Timings(len(job.prompt), begun)) for index, job in enumerate(jobs)]
        if body.stream:
            return EventStream(_stream(replies, await first_and_rest(http, pieces)))
        answers = await collect(http, pieces, len(jobs))
        whole = [reply.whole(answer) for reply, answer in zip(replies, answers, strict=True)]
        return JSONResponse(whole if _several(body.prompt) else whole[0])

    @router.post("/infill", response_model=None)
    async def infill(http: HttpRequest, body: InfillRequest) -> Response:
        served.choose_model(body.model)
        return await answer(http, await asyncio.to_thread(_filling, served, body))

    @router.post("/apply-template")
    async def apply_template(body: ChatRequest) -> dict[str, str]:
        return {"prompt": await asyncio.to_thread(chat_text, served, body, body.add_generation_prompt is not False)}

    return router


def _filling(served: Served, body: InfillRequest) -> NativeCompletion:
    """Return the completion that fills the gap."""
    tokens = fill_tokens(served.tokenizer, "input_suffix")
    extras = [Extra(extra.text, extra.filename) for extra in body.input_extra]
    most = body.max_tokens
    ids = fill_prompt(served, tokens, body.input_prefix, body.input_suffix, body.prompt, extras, most)
    return body.model_copy(
        update={"prompt": list(ids), "stop_token_ids": [*(body.stop_token_ids or []), *tokens.stops]}
    )


def _jobs(served: Served, body: NativeCompletion) -> list[Job]:
    body = body.model_copy(update={"logit_bias": _bias(served, body.logit_bias)})
    prompts = [_ids(served, each) for each in (body.prompt if _several(body.prompt) else [body.prompt])]
    if not 1 <= len(prompts) <= MAX_CHOICES:
        raise invalid(f"There must be from 1 to {MAX_CHOICES} prompts (there are {len(prompts)}).", "prompt")
    return [_job(served, body, prompt) for prompt in prompts]


def _job(served: Served, body: NativeCompletion, prompt: tuple[int, ...]) -> Job:
    """Return the answer to be generated; it ends where the context does, however many tokens are asked for."""
    sampling = sampling_params(served, body, prompt, None, body.n_probs or 0, 0)
    most = min(sampling.max_tokens or 1, served.context_length if body.max_tokens is None else max(1, body.max_tokens))
    sampling = replace(sampling, max_tokens=most, processed_logprobs=bool(body.post_sampling_probs))
    return Job(prompt, sampling, body.stops(), continuing=True, progress=bool(body.stream and body.return_progress))


def _several(prompt: Any) -> bool:
    """Return whether a prompt is a list of prompts: one list may also mix tokens and texts to one prompt."""
    return isinstance(prompt, list) and not any(isinstance(part, int) for part in prompt)


def _ids(served: Served, prompt: Any) -> tuple[int, ...]:
    """Return the ids of a text, of `{"prompt_string": text}`, or of tokens and texts mixed."""
    if isinstance(prompt, Mapping) and prompt.keys() <= {"prompt_string", "multimodal_data"}:
        if prompt.get("multimodal_data"):
            raise invalid("'multimodal_data' is not supported by this server: it reads text only.", "prompt")
        prompt = prompt.get("prompt_string")
    ids: list[int] = []
    for part in prompt if isinstance(prompt, list) else [prompt]:
        if isinstance(part, str):
            ids += served.tokenizer.encode(part, add_special_tokens=not ids)
        elif type(part) is int and 0 <= part < served.tokenizer.vocab_size:
            ids.append(part)
        else:
            raise invalid("A prompt must be a text, tokens of the vocabulary, or a list of both.", "prompt")
    if not ids:
        raise invalid("A prompt must have at least one token.", "prompt")
    return tuple(ids)


def _bias(served: Served, given: Any) -> dict[str, float] | None:
    """Return the bias of each token: pairs or a mapping, of tokens or of texts, `false` for never."""
    if given is None:
        return None
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        return {
            str(token): NEVER if bias is False else float(bias)
            for name, bias in pairs
            for token in _tokens(served, name)
        }
    except (TypeError, ValueError) as error:
        message = "'logit_bias' must be a list of [token or text, bias] or an object of them."
        raise invalid(message, "logit_bias") from error


def _tokens(served: Served, name: Any) -> list[int]:
    if isinstance(name, str) and not name.isdigit():
        return served.tokenizer.encode(name)
    return [int(name)]


async def _stream(replies: "list[_Reply]", pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
    """Yield server-sent events; an error in mid-stream is the last of them."""
    try:
        async for index, piece in pieces:
            if piece.content or piece.tokens or piece.read is not None:
                yield server_event(replies[index].part(piece))
            if piece.finish_reason:
                yield server_event(replies[index].last([piece]))
    except ApiError as error:
        yield server_event(error.body())


@dataclass
class _Reply:
    """The shape of one answer."""

    served: Served
    body: NativeCompletion
    job: Job
    index: int
    timings: Timings

    def __post_init__(self) -> None:
        self._new_line = False

    def part(self, piece: Piece) -> dict[str, Any]:
        """Return the event of one piece."""
        self.timings.saw(piece)
        self._new_line |= "\n" in piece.content
        tokens = [token.id for token in piece.tokens]
        part: dict[str, Any] = {"index": self.index, "content": piece.content, "tokens": tokens, "stop": False}
        if piece.read is not None:
            part["prompt_progress"] = self.timings.progress(piece)
        if self.body.timings_per_token:
            part["timings"] = self.timings.values(piece)
        return {**part, **self._counts(piece), **self._probabilities(piece.tokens)}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        for piece in pieces:
            self.part(piece)
        tokens = [token for piece in pieces for token in piece.tokens]
        answer = self.last(pieces) | {
            "content": "".join(piece.content for piece in pieces),
            "tokens": [token.id for token in tokens] if self.body.return_tokens else [],
            **self._probabilities(tokens),
        }
        wanted = self.body.response_fields
        return {path: _at(answer, path) for path in wanted} if wanted else answer

    def last(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return what is known when the answer has ended."""
        piece = pieces[-1]
        self.timings.saw(piece)
        used = len(self.job.prompt) + piece.completion_tokens
        return {
            "index": self.index,
            "content": "",
            "tokens": [],
            "stop": True,
            "model": self.served.answering,
            **self._counts(piece),
            "tokens_cached": used,
            "generation_settings": self._settings(),
            "prompt": self.served.tokenizer.decode(self.job.prompt, skip_special=False),
            "has_new_line": self._new_line,
            "truncated": piece.finish_reason == "length" and used >= self.served.context_length,
            "stop_type": "word" if piece.stop else STOP_TYPES.get(piece.finish_reason or "", "none"),
            "stopping_word": piece.stop or "",
            "timings": self.timings.values(piece),
        }

    def _counts(self, piece: Piece) -> dict[str, int]:
        return {"tokens_predicted": piece.completion_tokens, "tokens_evaluated": len(self.job.prompt)}

    def _settings(self) -> dict[str, Any]:
        sampling = self.job.sampling
        ends = self.served.stop_token_ids if self.body.ignore_eos else ()
        bias = [{"token": token, "bias": bias} for token, bias in sampling.logit_bias]
        return {
            "n_predict": sampling.max_tokens if self.body.max_tokens is None else self.body.max_tokens,
            "seed": sampling.seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": [*bias, *({"token": token, "bias": None} for token in ends)],
            "stop": list(self.job.stops),
            "ignore_eos": bool(self.body.ignore_eos),
            "n_probs": self.body.n_probs or 0,
            "stream": bool(self.body.stream),
        }

    def _probabilities(self, tokens: list[ScoredToken]) -> dict[str, Any]:
        if not self.body.n_probs:
            return {}
        return {"completion_probabilities": [self._scored(token) for token in tokens]}

    def _scored(self, token: ScoredToken) -> dict[str, Any]:
        processed = bool(self.body.post_sampling_probs)
        name = "top_probs" if processed else "top_logprobs"
        rivals = [self._token(*rival) for rival in token.top if not processed or math.exp(rival[1]) > 0]
        return {**self._token(token.id, token.logprob), name: rivals}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        values = {"id": token, **token_values(self.served.tokenizer, token, logprob)}
        if self.body.post_sampling_probs:
            values["prob"] = math.exp(values.pop("logprob"))
        return values


def _at(values: dict[str, Any], path: str) -> Any:
    """Return the value at a path such as "generation_settings/seed"; None if there is none."""
    for name in path.split("/"):
        values = values.get(name) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values
