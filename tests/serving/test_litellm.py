"""Oracle: `litellm`, a proxy of others, in front of this server: through both of its providers that fit."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest

from liaoyuan.data.tokenizer import Tokenizer
from tests.serving.conftest import ScriptedRunner, scripted

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else the import asks the network for prices
litellm = pytest.importorskip("litellm")

ANSWER = "7 + 5 = 12</think>The answer is 42."
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # its own types warn
PROVIDERS = ["openai", "anthropic"]


@pytest.fixture(scope="module")
def said(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    with scripted(tokenizer, ANSWER) as serving:
        yield serving


def asked(provider: str, url: str, **fields: Any) -> dict[str, Any]:
    on = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "allowed_openai_params": ["thinking"]}
    thinking = on if provider == "anthropic" else {}
    return {
        "model": f"{provider}/scripted",
        "api_base": url + ("/v1" if provider == "openai" else ""),
        "api_key": "none",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 17 + 25?"}],
        "max_tokens": 2000,
        "num_retries": 0,
        **thinking,
        **fields,
    }


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_answer_and_its_thought(provider: str, said: tuple[str, ScriptedRunner]) -> None:
    reply = litellm.completion(**asked(provider, said[0]))
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == ("The answer is 42.", "7 + 5 = 12")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens > 0 and reply.usage.completion_tokens > 0


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_stream_says_the_same(provider: str, said: tuple[str, ScriptedRunner]) -> None:
    chunks = list(litellm.completion(**asked(provider, said[0], stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The answer is 42."
    thought = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert thought == "7 + 5 = 12"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_asynchronous_calls(provider: str, said: tuple[str, ScriptedRunner]) -> None:
    async def texts() -> set[str]:
        whole = await litellm.acompletion(**asked(provider, said[0]))
        stream = await litellm.acompletion(**asked(provider, said[0], stream=True))
        streamed = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return {whole.choices[0].message.content, "".join(streamed)}

    assert asyncio.run(texts()) == {"The answer is 42."}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_mistakes_are_told_apart(provider: str, said: tuple[str, ScriptedRunner]) -> None:
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(**asked(provider, said[0], model=f"{provider}/other"))
    with pytest.raises(litellm.BadRequestError, match="context"):
        messages = [{"role": "user", "content": "12 " * 20000}]
        litellm.completion(**asked(provider, said[0], messages=messages))


def test_responses_through_litellm(said: tuple[str, ScriptedRunner]) -> None:
    fields = {"model": "openai/scripted", "api_base": said[0] + "/v1", "api_key": "none", "input": "What is 17 + 25?"}
    whole = litellm.responses(**fields)
    assert whole.output[-1].content[0].text == "The answer is 42."
    kinds = [event.type for event in litellm.responses(**fields, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
