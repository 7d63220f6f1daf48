"""Log-probabilities of a prompt's own tokens (`echo` with `logprobs`, `prompt_logprobs`).

A prompt that fits into one step of the engine is scored by the forward pass of `evaluation.score`, so that the two
agree to the last bit (of a model in one process). Else it goes through the engine in chunks, so that the answers of
others go on.
"""

import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import PromptLogprobs, Request, SamplingParams
from liaoyuan.inference.operations import Score
from liaoyuan.serving.adapters import ADAPTER
from liaoyuan.serving.caller import CALLER
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import Served, asked_of_engine, engine_events, finite


async def prompt_scores(served: Served, prompt: tuple[int, ...], top: int) -> PromptLogprobs:
    """Return the log-probabilities of a prompt's tokens after the first, each with its `top` rivals.

    Raises:
        ApiError: the prompt is too long, the engine is not ready, or time is up.
    """
    if len(prompt) < 2:
        return PromptLogprobs([], [])
    adapter = ADAPTER.get()
    scores = await asked_of_engine(served, Score(list(prompt), top, adapter))
    if scores is not None:
        top_logprobs = [[(token, logprob) for token, logprob in row] for row in scores["top"]]
        return PromptLogprobs(scores["logprobs"], top_logprobs)
    caller, sampling = CALLER.get(), SamplingParams(max_tokens=1, prompt_logprobs=top)
    key = caller.key
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
