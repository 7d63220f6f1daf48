"""Oracle: the official `openai` client's responses, whose accumulator raises on events in a wrong order."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import open_server
from tests.serving.conftest import ScriptedRunner, scripted

QUESTION = "What is 17 + 25?"
ANSWER = "7 + 5 = 12</think>The answer is 42."
FAST: dict[str, Any] = {"reasoning": {"effort": "none"}}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "input": QUESTION, **fields}


@pytest.fixture(scope="module")
def said(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    with scripted(tokenizer, ANSWER) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(said: tuple[str, ScriptedRunner]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=said[0] + "/v1", api_key="none", max_retries=0) as made:
        yield made


def without_ids(response: Any) -> dict[str, Any]:
    values = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in values["output"]:
        item.pop("id")
    return values


def test_a_thought_and_an_answer_are_items(client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(instructions="Be brief.", metadata={"a": "b"}, temperature=0.5))
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "7 + 5 = 12"
    assert response.output_text == "The answer is 42."
    assert (response.status, response.instructions, response.temperature) == ("completed", "Be brief.", 0.5)
    assert response.metadata == {"a": "b"} and response.tools == [] and response.error is None
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    whole = client.responses.create(**asked())
    events = list(client.responses.create(**asked(), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.completed",
    ]
    assert without_ids(events[-1].response) == without_ids(whole)
    with client.responses.stream(**asked()) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == whole.output_text == stream.get_final_response().output_text


def test_asynchronous_responses(said: tuple[str, ScriptedRunner]) -> None:
    async def texts() -> set[str]:
        async with openai.AsyncOpenAI(base_url=said[0] + "/v1", api_key="none", max_retries=0) as client:

            async def streamed() -> str:
                async with client.responses.stream(**asked()) as stream:
                    return (await stream.get_final_response()).output_text

            whole = await client.responses.create(**asked())
            return {whole.output_text, *await asyncio.gather(*(streamed() for _ in range(5)))}

    assert asyncio.run(texts()) == {"The answer is 42."}


def test_turns_given_in_full_are_the_chat_that_they_mean(
    client: openai.OpenAI, said: tuple[str, ScriptedRunner], tokenizer: Tokenizer
) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is 17?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}], "id": "msg_1"},
        {"role": "user", "content": "And now?"},
    ]
    client.responses.create(**asked(instructions="Be brief.", input=items, store=False, **FAST))
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 17?"},
        {"role": "assistant", "content": "42", "reasoning_content": "hm"},
        {"role": "user", "content": "And now?"},
    ]
    assert said[1].requests[-1].prompt == tuple(tokenizer.render(chat, thinking=False))


def test_a_response_goes_on_from_an_earlier_one(
    client: openai.OpenAI, said: tuple[str, ScriptedRunner], tokenizer: Tokenizer
) -> None:
    first = client.responses.create(**asked(instructions="Be brief."))
    with client.responses.stream(**asked(input="Why?", previous_response_id=first.id)) as stream:
        second = stream.get_final_response()
    client.responses.create(**asked(input="Sure?", previous_response_id=second.id, instructions="Be polite."))
    answer = {"role": "assistant", "content": "The answer is 42.", "reasoning_content": "7 + 5 = 12"}
    chat = [{"role": "system", "content": "Be polite."}]
    for question in (QUESTION, "Why?"):
        chat += [{"role": "user", "content": question}, answer]
    chat.append({"role": "user", "content": "Sure?"})
    assert said[1].requests[-1].prompt == tuple(tokenizer.render(chat, thinking=True))
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_a_response_that_is_not_stored_cannot_be_gone_on_from(client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(store=False))
    with pytest.raises(openai.NotFoundError, match="earlier turns in 'input'") as refused:
        client.responses.create(**asked(previous_response_id=response.id))
    assert refused.value.param == "previous_response_id"


def test_an_answer_that_was_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(max_output_tokens=12))
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[-1].status == "incomplete"
    events = list(client.responses.create(**asked(max_output_tokens=12), stream=True))
    assert events[-1].type == "response.incomplete"
    assert without_ids(events[-1].response) == without_ids(response)


def test_logprobs_are_included_on_demand(client: openai.OpenAI) -> None:
    include = ["message.output_text.logprobs"]
    response = client.responses.create(**asked(include=include, top_logprobs=2))
    scores = response.output[-1].content[0].logprobs
    assert "".join(score.token for score in scores).strip("\n") == "The answer is 42."
    assert all(len(score.top_logprobs) == 2 for score in scores)
    events = client.responses.create(**asked(include=include, top_logprobs=2), stream=True)
    streamed = [score for event in events if event.type == "response.output_text.delta" for score in event.logprobs]
    assert [score.token for score in streamed] == [score.token for score in scores][: len(streamed)]


@pytest.mark.parametrize(
    ("wrong", "said_of_it"),
    [
        ({"max_output_token": 5}, "did you mean 'max_output_tokens'"),
        ({"background": True}, "ask for a stream"),
        ({"truncation": "auto"}, "only 'disabled'"),
        ({"conversation": "conv_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "runs no 'web_search'"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "none of the tools"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_is_refused_and_how(client: openai.OpenAI, wrong: dict, said_of_it: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said_of_it):
        client.responses.create(**asked(extra_body=wrong))


def test_an_error_in_mid_stream_makes_a_failed_response(
    client: openai.OpenAI, said: tuple[str, ScriptedRunner]
) -> None:
    said[1].failure = "The engine failed."
    try:
        last = list(client.responses.create(**asked(), stream=True))[-1]
        assert last.type == "response.failed" and "engine failed" in last.response.error.message
        with pytest.raises(openai.InternalServerError, match="engine failed"):
            client.responses.create(**asked())
    finally:
        said[1].failure = ""


def test_a_real_engine_answers(model_folder: Path) -> None:
    with open_server(model_folder, port=0, name="tiny", engine=EngineConfig(max_sequences=2)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        fields = {"model": "tiny", "input": QUESTION, "max_output_tokens": 20, **FAST}
        sampling = {"seed": 3, "top_k": 20, "min_p": 0.01}
        whole = client.responses.create(**fields, extra_body=sampling)
        events = list(client.responses.create(**fields, extra_body=sampling, stream=True))
        assert without_ids(events[-1].response) == without_ids(whole)
