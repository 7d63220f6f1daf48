"""`/props` and `/slots`: what llama.cpp's clients ask a server about itself.

A slot of llama.cpp is the place of one running request with its part of the context. Here every request may have the
whole context, and no request keeps a place: of the slots that are told, as many are busy as requests run.
"""

from dataclasses import replace
from typing import Any

from fastapi import APIRouter

from liaoyuan.inference import SamplingParams
from liaoyuan.inference.operations import State
from liaoyuan.serving.generation import Served
from liaoyuan.serving.status import VERSION


def slot_routes(served: Served) -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()

    @router.get("/slots")
    async def slots() -> list[dict[str, Any]]:
        served.need("slots")
        running = served.runner.health().get("running", 0)
        context = {"n_ctx": served.context_length, "speculative": False}
        return [{"id": index, **context, "is_processing": index < running} for index in range(await _places(served))]

    @router.get("/props")
    async def props() -> dict[str, Any]:
        tokenizer = served.tokenizer
        named, places = tokenizer.named_tokens, await _places(served)
        return {
            "default_generation_settings": {"n_ctx": served.context_length, "params": _defaults(served)},
            "total_slots": places,
            "model_alias": served.name,
            "model_path": served.name,  # where it lies is no client's business
            "chat_template": tokenizer.template_text,
            "bos_token": named["bos_token"] or "",
            "eos_token": tokenizer.spelling(tokenizer.eos_ids[0]) if tokenizer.eos_ids else "",
            "modalities": {"vision": False, "audio": False},
            "build_info": f"liaoyuan-{VERSION}",
            "is_sleeping": served.runner.health().get("state") == "asleep",
        }

    return router


async def _places(served: Served) -> int:
    """Return how many requests run at once."""
    return int((await served.runner.do(State()))["max_sequences"])


def _defaults(served: Served) -> dict[str, Any]:
    """Return what a request that says nothing gets, in llama.cpp's names; -1: no limit, any seed."""
    usual = replace(SamplingParams(seed=-1), **served.settings.sampling.model_dump(exclude_none=True))
    return {
        "n_predict": -1,
        "seed": usual.seed,
        "temperature": usual.temperature,
        "top_k": usual.top_k,
        "top_p": usual.top_p,
        "min_p": usual.min_p,
        "repeat_penalty": usual.repetition_penalty,
        "presence_penalty": usual.presence_penalty,
        "frequency_penalty": usual.frequency_penalty,
        "stream": False,
    }
