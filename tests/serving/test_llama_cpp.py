"""Promises of llama.cpp's own paths: what its clients send and read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import open_server


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[httpx.Client]:
    serving = open_server(model_folder, port=0, name="tiny", engine=EngineConfig(max_sequences=8))
    with serving as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as made:
        yield made


def completion(client: httpx.Client, **fields: Any) -> Any:
    reply = client.post("/completion", json={"prompt": "The answer", "n_predict": 8, "seed": 1, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_stream_says_what_the_whole_says(client: httpx.Client) -> None:
    whole = completion(client, return_tokens=True, n_probs=3)
    text = client.post(
        "/completion", json={"prompt": "The answer", "n_predict": 8, "seed": 1, "n_probs": 3, "stream": True}
    ).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [token for event in events for token in event["tokens"]] == whole["tokens"]
    scores = [score for event in events for score in event.get("completion_probabilities", [])]
    assert scores == whole["completion_probabilities"] and all(len(score["top_logprobs"]) == 3 for score in scores)
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert (events[-1]["stop_type"], events[-1]["timings"]["predicted_n"]) == ("limit", 8)


def test_prompts_in_all_their_forms(client: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The answer")
    alone = completion(client)["content"]
    for same in (ids, {"prompt_string": "The answer"}, [*ids[:1], tokenizer.decode(ids[1:])]):
        assert completion(client, prompt=same)["content"] == alone
    both = completion(client, prompt=["The answer", ids])
    assert [answer["content"] for answer in both] == [alone, alone]
    for wrong in (None, {}, [], [True, "x"], [9999], {"prompt_string": "x", "multimodal_data": ["x"]}):
        assert client.post("/completion", json={"prompt": wrong}).status_code == 400


def test_an_answer_ends_where_the_context_does(client: httpx.Client) -> None:
    answer = completion(client, n_predict=100_000, ignore_eos=True)
    assert answer["tokens_predicted"] + answer["tokens_evaluated"] == 256 and answer["stop_type"] == "limit"


@pytest.mark.parametrize("form", [lambda token, text: [[token, False]], lambda token, text: {text: -100}])
def test_a_bias_may_name_a_token_or_a_text(client: httpx.Client, form: Any, tokenizer: Tokenizer) -> None:
    token = completion(client, temperature=0, return_tokens=True)["tokens"][0]
    banned = completion(
        client, temperature=0, return_tokens=True, logit_bias=form(token, tokenizer.token_bytes(token).decode())
    )
    assert token not in banned["tokens"]
    assert client.post("/completion", json={"prompt": "x", "logit_bias": [3]}).status_code == 400


def test_only_the_wanted_fields(client: httpx.Client) -> None:
    answer = completion(client, response_fields=["content", "generation_settings/seed", "nothing/here"])
    assert answer["generation_settings/seed"] == 1 and len(answer) == 3


def test_a_conversation_as_the_template_writes_it(client: httpx.Client, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    reply = client.post("/apply-template", json={"messages": messages})
    assert reply.json() == {"prompt": tokenizer.render_text(messages)}
    bare = client.post("/apply-template", json={"messages": messages, "add_generation_prompt": False}).json()
    assert reply.json()["prompt"].startswith(bare["prompt"]) and bare != reply.json()


def test_paths_without_a_version(client: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert client.post("/chat/completions", json=asked).status_code == 200
    assert client.get("/models").json()["data"][0]["id"] == "tiny"


STORIES = Path(__file__).parents[3] / "shared/models/stories260k"


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k, a SentencePiece model")
@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_a_completion_begins_with_the_space_that_parts_it_from_the_prompt(path: str) -> None:
    """SentencePiece writes the space before a word into the word; a text that begins loses it, one that goes on not."""
    with open_server(STORIES, port=0, engine=EngineConfig(max_sequences=2)) as server:
        asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        reply = httpx.post(server.url + path, json=asked, trust_env=False, timeout=60).json()
        assert (reply.get("content") or reply["choices"][0]["text"]).startswith((" ", ","))
        asked["prompt"] = "Once upon a time, there"
        reply = httpx.post(server.url + path, json=asked, trust_env=False, timeout=60).json()
        assert (reply.get("content") or reply["choices"][0]["text"]).startswith(" was a")


def test_a_server_that_does_not_think_unless_it_is_asked_to(model_folder: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    serving = open_server(model_folder, port=0, name="tiny", thinking=False)
    with serving as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        prompts = [
            client.post("/apply-template", json={**asked, **more}).json()["prompt"]
            for more in ({}, {"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "low"})
        ]
    assert [prompt.endswith("<think></think>") for prompt in prompts] == [True, False, False]


def test_times_are_told_and_the_first_token_has_none_of_its_own(client: httpx.Client) -> None:
    for count in (1, 5):
        times = completion(client, n_predict=count, ignore_eos=True)["timings"]
        assert times["predicted_n"] == count and times["prompt_per_token_ms"] > 0
        if count == 1:
            assert times["predicted_per_second"] == times["predicted_per_token_ms"] == 0
        else:
            assert times["predicted_per_second"] == pytest.approx(1000 * (count - 1) / times["predicted_ms"])
            assert times["predicted_per_token_ms"] == pytest.approx(times["predicted_ms"] / (count - 1))


def test_an_answer_that_fills_the_context_says_it_was_truncated(client: httpx.Client) -> None:
    assert completion(client, n_predict=-1, ignore_eos=True)["truncated"] is True
    assert completion(client, n_predict=2)["truncated"] is False


def test_a_chat_tells_its_times_and_its_prompt_to_who_asks(client: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "id_slot": 0, "cache_prompt": True}
    stream = client.post("/v1/chat/completions", json={**asked, "stream": True, "timings_per_token": True})
    chunks = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
    assert "timings" not in chunks[0] and chunks[-1]["timings"]["predicted_n"] == 3
    told = client.post("/v1/chat/completions", json={**asked, "verbose": True}).json()
    assert told["__verbose"] == client.post("/apply-template", json={"messages": asked["messages"]}).json()


def test_a_server_tells_its_slots_and_its_properties(client: httpx.Client, tokenizer: Tokenizer) -> None:
    slots, props = client.get("/slots").json(), client.get("/props").json()
    assert len(slots) == props["total_slots"] == 8
    assert {slot["n_ctx"] for slot in slots} == {props["default_generation_settings"]["n_ctx"]}
    assert not any(slot["is_processing"] for slot in slots)
    assert props["chat_template"] == tokenizer.template_text and props["is_sleeping"] is False


def chunks(client: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a stream."""
    told = client.post(path, json={"stream": True, "timings_per_token": True, "return_progress": True, **fields})
    assert told.status_code == 200, told.text
    return [json.loads(line[6:]) for line in told.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("path", ["/completion", "/v1/chat/completions", "/v1/responses"])
def test_a_stream_tells_how_the_prompt_is_read(model_folder: Path, path: str) -> None:
    engine = EngineConfig(max_sequences=4, max_batch_tokens=32)  # so that the prompt takes several steps
    with open_server(model_folder, port=0, engine=engine) as server, httpx.Client(base_url=server.url) as client:
        long = "The answer is 42. " * 12
        asked: dict[str, Any] = {"prompt": long, "n_predict": 3, "seed": 1}
        if path != "/completion":
            asked = {"messages": [{"role": "user", "content": long}], "max_tokens": 3, "seed": 1}
        if path == "/v1/responses":
            asked = {"input": long, "max_output_tokens": 3, "seed": 1}
        for cached in (False, True):
            told = [event for event in chunks(client, path, **asked) if "prompt_progress" in event]
            progress = [event["prompt_progress"] for event in told]
            read = [each["processed"] for each in progress]
            assert read[0] == progress[0]["cache"] and (read[0] > 0) == cached
            assert read[-1] == progress[-1]["total"] and read == sorted(set(read)) and len(read) > 1
            assert len(read) > 3 or cached
            if path == "/completion":
                first = told[0]["timings"]
                assert first["prompt_n"] == first["prompt_ms"] == first["predicted_n"] == 0
                assert told[-1]["timings"]["prompt_n"] == read[-1] - read[0]
        quiet = chunks(client, path, **asked, return_progress=False)
        assert not any("prompt_progress" in event for event in quiet) and any("timings" in event for event in quiet)


def test_a_prompt_that_is_too_long_has_the_error_of_the_dialect(client: httpx.Client) -> None:
    long = [{"role": "user", "content": "x " * 500}]
    theirs = client.post("/chat/completions", json={"messages": long})
    ours = client.post("/v1/chat/completions", json={"messages": long})
    assert theirs.status_code == ours.status_code == 400
    error = theirs.json()["error"]
    assert (error["type"], error["n_ctx"]) == ("exceed_context_size_error", 256) and error["n_prompt_tokens"] > 500
    assert ours.json()["error"].keys() == {"message", "type", "param", "code"}
    assert ours.json()["error"]["type"] == "invalid_request_error"
    assert "exceeds the available context size (256 tokens)" in error["message"] == ours.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
def test_two_fields_have_llama_cpps_names_everywhere(client: httpx.Client, path: str) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    own = {"ignore_eos": True, "seed": 1, "n_predict": 3, "repeat_penalty": 1.2}
    reply = client.post(path, json={**asked, **own}).json()
    assert (reply.get("tokens_predicted") or reply["usage"]["completion_tokens"]) == 3
    both = client.post(path, json={**asked, "n_predict": 3, "max_tokens": 3})
    assert both.status_code == 400 and "two names of one thing" in both.json()["error"]["message"]


def test_times_of_a_whole_answer_are_those_of_its_making(client: httpx.Client) -> None:
    times = completion(client, n_predict=50, ignore_eos=True)["timings"]
    assert times["predicted_ms"] > 1.0 and times["prompt_ms"] > 0.1
