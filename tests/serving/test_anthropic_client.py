"""Oracle: the official `anthropic` client, whose accumulators raise on events in a wrong order."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import open_server
from tests.serving.conftest import CONTEXT, ScriptedRunner, scripted

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
ANSWER = "7 + 5 = 12</think>The answer is 42."
THINKS = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "max_tokens": 400, "messages": QUESTION, **fields}


@pytest.fixture(scope="module")
def said(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    with scripted(tokenizer, ANSWER) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(said: tuple[str, ScriptedRunner]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=said[0], api_key="none", max_retries=0) as made:
        yield made


def test_a_thought_and_an_answer_are_blocks(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**asked(**THINKS))
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "7 + 5 = 12" and message.content[0].signature
    assert message.content[1].text == "The answer is 42."
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    assert message.usage.output_tokens_details.thinking_tokens > 0


def test_a_stream_says_what_the_whole_says(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**asked(**THINKS))
    with client.messages.stream(**asked(**THINKS)) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert streamed.model_dump(exclude={"id"}) == whole.model_dump(exclude={"id"})
    own = [kind for kind in kinds if kind.startswith(("message", "content_block_st"))]
    block = ["content_block_start", "content_block_stop"]
    assert own == ["message_start", *block, *block, "message_delta", "message_stop"]


def test_asynchronous_streams(said: tuple[str, ScriptedRunner]) -> None:
    async def texts() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=said[0], api_key="none", max_retries=0) as client:

            async def one() -> str:
                async with client.messages.stream(**asked(**THINKS)) as stream:
                    return "".join([text async for text in stream.text_stream])

            whole = await client.messages.create(**asked(**THINKS))
            return [whole.content[-1].text, *await asyncio.gather(*(one() for _ in range(5)))]

    assert set(asyncio.run(texts())) == {"The answer is 42."}


def test_the_raw_events_have_names_and_one_order(said: tuple[str, ScriptedRunner]) -> None:
    reply = httpx.post(said[0] + "/v1/messages", json=asked(stream=True, **THINKS), trust_env=False)
    assert reply.headers["content-type"].startswith("text/event-stream")
    names = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_thinking_is_off_unless_asked_for(client: anthropic.Anthropic, said: tuple[str, ScriptedRunner]) -> None:
    marks = said[1].requests
    client.messages.create(**asked())
    off = marks[-1].prompt
    client.messages.create(**asked(thinking={"type": "adaptive"}))
    assert len(off) == len(marks[-1].prompt) + 1  # the thought is closed at once


def test_thoughts_may_be_left_out(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**asked(thinking={"type": "adaptive", "display": "omitted"}))
    assert message.content[0].thinking == "" and message.content[0].signature
    assert message.content[1].text == "The answer is 42."


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**asked(stop_sequences=["never", " is"], **THINKS))
    assert message.content[-1].text == "The answer"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " is")


def test_what_cut_an_answer_off(client: anthropic.Anthropic, model_folder: Path) -> None:
    assert client.messages.create(**asked(max_tokens=12)).stop_reason == "max_tokens"
    with open_server(model_folder, port=0, name="scripted", engine=EngineConfig(max_sequences=2)) as server:
        small = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        sampling = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
        message = small.messages.create(**asked(max_tokens=4000, extra_body=sampling))
        assert message.stop_reason in ("model_context_window_exceeded", "end_turn")
        assert message.usage.input_tokens + message.usage.output_tokens <= CONTEXT
        with pytest.raises(anthropic.BadRequestError, match="context"):
            small.messages.create(**asked(messages=[{"role": "user", "content": "12 " * 500}]))


def test_counted_tokens_are_those_of_the_prompt(client: anthropic.Anthropic) -> None:
    turns = {"system": [{"type": "text", "text": "Be brief."}], "messages": QUESTION}
    counted = client.messages.count_tokens(model="scripted", **turns)
    assert counted.input_tokens == client.messages.create(**asked(**turns)).usage.input_tokens


def test_a_conversation_with_blocks_is_the_chat_that_it_means(
    client: anthropic.Anthropic, said: tuple[str, ScriptedRunner], tokenizer: Tokenizer
) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 17?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "xxx"},
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "42"},
            ],
        },
        {"role": "user", "content": "First."},
        {"role": "user", "content": "Second."},
    ]
    client.messages.create(**asked(system="Be brief.", messages=turns))
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 17?"},
        {"role": "assistant", "content": "42", "reasoning_content": "hm"},
        {"role": "user", "content": "First.\n\nSecond."},
    ]
    assert said[1].requests[-1].prompt == tuple(tokenizer.render(chat, thinking=False))


def test_an_answer_goes_on_from_the_beginning_it_is_given(
    client: anthropic.Anthropic, said: tuple[str, ScriptedRunner], tokenizer: Tokenizer
) -> None:
    client.messages.create(**asked(messages=[*QUESTION, {"role": "assistant", "content": "The answer"}], **THINKS))
    begun = [*tokenizer.render(QUESTION, thinking=True), tokenizer.think_ids[1], *tokenizer.encode("The answer")]
    assert said[1].requests[-1].prompt == tuple(begun)


def test_models_are_listed(client: anthropic.Anthropic) -> None:
    [model] = client.models.list()
    assert (model.id, model.type) == ("scripted", "model")
    assert client.models.retrieve("scripted").created_at.year >= 2020


def test_errors_have_the_shape_that_the_client_knows(
    client: anthropic.Anthropic, said: tuple[str, ScriptedRunner]
) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**asked(model="claude"))
    assert missing.value.body["error"]["type"] == "not_found_error"
    for wrong, said_of_it in (
        ({"max_token": 5}, "did you mean 'max_tokens'"),
        ({"temperature": 2}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"mcp_servers": [{"url": "x"}]}, "never leaves"),
        ({"tool_choice": {"type": "tool"}}, "needs it"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=said_of_it) as refused:
            client.messages.create(**asked(extra_body=wrong))
        assert refused.value.body["type"] == "error"
        assert refused.value.body["error"]["type"] == "invalid_request_error"
    said[1].busy = True
    try:
        with pytest.raises(anthropic.RateLimitError, match="busy"):
            client.messages.create(**asked())
    finally:
        said[1].busy = False


def test_an_error_in_mid_stream_is_raised(client: anthropic.Anthropic, said: tuple[str, ScriptedRunner]) -> None:
    said[1].failure = "The engine failed."
    try:
        with pytest.raises(anthropic.APIError, match="engine failed"), client.messages.stream(**asked()) as stream:
            stream.get_final_message()
    finally:
        said[1].failure = ""
