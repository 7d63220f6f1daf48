"""Log-probabilities of a prompt's own tokens (`echo` with `logprobs`, `prompt_logprobs`).

A prompt that fits into one step of the engine is scored by the forward pass of `evaluation.score`, so that the two
agree to the last bit (of a model in one process). Else it goes through the engine in chunks, so that the answers of
others go on.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import Engine, PromptLogprobs, Request, SamplingParams
from liaoyuan.inference.spread.memory import OwnMemory
from liaoyuan.models import Decoder, packed_context
from liaoyuan.serving.adapters import ADAPTER
from liaoyuan.serving.caller import CALLER
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import Served, between_steps, engine_events, finite

ROWS = 1024  # whose logits are in memory at once


async def prompt_scores(served: Served, prompt: tuple[int, ...], top: int) -> PromptLogprobs:
    """Return the log-probabilities of a prompt's tokens after the first, each with its `top` rivals.

    Raises:
        ApiError: the prompt is too long, the engine is not ready, or time is up.
    """
    if len(prompt) < 2:
        return PromptLogprobs([], [])
    if len(prompt) <= await between_steps(served, _most_at_once):
        adapter = ADAPTER.get()
        return await between_steps(served, lambda engine: _scored(engine, adapter, prompt, top))
    caller, sampling = CALLER.get(), SamplingParams(max_tokens=1, prompt_logprobs=top)
    key, adapter = caller.key, ADAPTER.get()
    left = caller.time_left()
    request = Request(secrets.token_hex(12), prompt, sampling, key=key, adapter=adapter, timeout=left)
    async with contextlib.aclosing(engine_events(served, request)) as events:
        async for event in events:
            if event.prompt is not None:
                return event.prompt
    raise ApiError(504, "The prompt was not scored in time.", code="timeout")


def score_rows(
    prompt: Sequence[int], scores: PromptLogprobs, most: int, text: Callable[[int], str]
) -> list[dict[str, Any] | None]:
    """Return vLLM's form: for each token of a prompt after the first, ids with their log-probabilities.

    most: rivals at each place. text: what a token is shown as.
    """
    rows: list[dict[str, Any] | None] = [None]
    for token, logprob, top in zip(prompt[1:], scores.logprobs, scores.top, strict=True):
        ranks = {rival: rank for rank, (rival, _) in enumerate(top, 1)}
        entries = {token: logprob, **{rival: score for rival, score in top[:most] if rival != token}}
        rows.append(
            {
                str(one): {"logprob": finite(score), "rank": ranks.get(one), "decoded_token": text(one)}
                for one, score in entries.items()
            }
        )
    return rows


def shown(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; one that is no whole text by itself is shown by its bytes, as OpenAI does."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _most_at_once(engine: Engine) -> int:
    """Return how long a prompt may be to be scored in one pass: none where only the engine reaches the whole head."""
    return engine.config.max_batch_tokens if isinstance(engine.memory, OwnMemory) else 0


@torch.inference_mode()
def _scored(engine: Engine, adapter: str, prompt: tuple[int, ...], top: int) -> PromptLogprobs:
    model = engine.model
    tokens = torch.tensor(prompt, device=model.embed_tokens.weight.device)
    positions, context = packed_context([len(prompt) - 1], tokens.device)
    with engine.adapters.everywhere(adapter):
        hidden = model(tokens[:-1], positions, context, hidden=True)
    logprobs = model.score(hidden, tokens[1:]).tolist()
    return PromptLogprobs(logprobs, list(_rivals(model, hidden, top)) if top else [[] for _ in logprobs])


def _rivals(model: Decoder, hidden: Tensor, top: int) -> Iterator[list[tuple[int, float]]]:
    for rows in hidden.split(ROWS):
        scores = model.logits(rows).float().log_softmax(-1)
        values, tokens = scores.topk(min(top, scores.shape[1]), dim=-1)
        for row in zip(tokens.tolist(), values.tolist(), strict=True):
            yield list(zip(*row, strict=True))
