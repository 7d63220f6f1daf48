"""`/tokenize`, `/detokenize`, `/tokenizer_info`: what the tokenizer does, in vLLM's and in llama.cpp's shapes."""

import asyncio
from typing import Any

from fastapi import APIRouter

from liaoyuan.serving.chat_body import ChatRequest
from liaoyuan.serving.conversation import chat_prompt
from liaoyuan.serving.generation import Served
from liaoyuan.serving.tokens_body import DetokenizeRequest, TokenizeRequest


def token_routes(served: Served) -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        served.check_model(body.model)
        return await asyncio.to_thread(_tokenized, served, body)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        served.check_model(body.model)
        served.check_tokens(body.tokens, "tokens")
        text = await asyncio.to_thread(served.tokenizer.decode, body.tokens, False)
        return {"prompt": text, "content": text}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = served.tokenizer
        named = tokenizer.named_tokens
        if named["eos_token"] is None and tokenizer.eos_ids:
            named["eos_token"] = tokenizer.spelling(tokenizer.eos_ids[0])
        sizes = {"vocab_size": tokenizer.vocab_size, "model_max_length": served.context_length}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "chat_template": tokenizer.template_text,
            **sizes,
        }

    return router


def _tokenized(served: Served, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer, ids = served.tokenizer, _ids(served, body)
    if body.content is not None:
        pieces = [{"id": index, "piece": _piece(tokenizer.token_bytes(index))} for index in ids]
        return {"tokens": pieces if body.with_pieces else ids}
    spellings = [tokenizer.spelling(index) for index in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.context_length, "tokens": ids, "token_strs": spellings}


def _ids(served: Served, body: TokenizeRequest) -> list[int]:
    """Return the ids of what a request brings: a prompt gets the model's special tokens unless it says otherwise."""
    if body.messages is not None:
        asked = ChatRequest(
            messages=body.messages,
            tools=body.tools,
            chat_template_kwargs=body.chat_template_kwargs,
            continue_final_message=body.continue_final_message,
        )
        return list(chat_prompt(served, asked, body.add_generation_prompt is not False))
    special = bool(body.add_special) if body.content is not None else body.add_special_tokens is not False
    text = body.prompt if body.content is None else body.content
    assert text is not None  # the body has one of the three
    return served.tokenizer.encode(text, special, parse_special=body.parse_special is not False)


def _piece(raw: bytes) -> str | list[int]:
    """Return a token's text, or its bytes if they are none by themselves (as llama.cpp does)."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
