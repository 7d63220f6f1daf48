"""Promises of `liaoyuan serve --set KEY=VALUE`: what a server does where requests leave it open."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from liaoyuan.config import load
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import Settings, open_server
from tests.serving.test_processes import wait_until
from tests.verbs import Verb

MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
FEW = EngineConfig(max_sequences=4)


@contextlib.contextmanager
def started(model_folder: Path, *given: str, **options: Any) -> Iterator[httpx.Client]:
    """Give a client of a server that was started with these settings."""
    settings = load(Settings, None, given)
    serving = open_server(model_folder, port=0, name="tiny", engine=FEW, settings=settings, **options)
    with serving as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        yield client


def chat(client: httpx.Client, **fields: Any) -> Any:
    reply = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 6, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text(client: httpx.Client, **fields: Any) -> str:
    asked = {"prompt": "The answer", "max_tokens": 8, **fields}
    return str(client.post("/v1/completions", json=asked).json()["choices"][0]["text"])


def test_sampling_that_a_request_does_not_say_is_the_servers(model_folder: Path) -> None:
    with started(model_folder, "sampling.seed=7", "sampling.top_k=5") as client:
        assert text(client) == text(client) == text(client, seed=7, top_k=5) != text(client, seed=8)
        native = client.post("/completion", json={"prompt": "The answer", "n_predict": 8}).json()
        assert native["content"] == text(client) and native["generation_settings"]["top_k"] == 5
        params = client.get("/props").json()["default_generation_settings"]["params"]
        assert (params["seed"], params["top_k"], params["temperature"]) == (7, 5, 1.0)
    with started(model_folder, "sampling.temperature=0") as client:
        assert text(client, seed=1) == text(client, seed=2) != text(client, seed=1, temperature=1.5)


def test_a_model_may_have_several_names_and_tags(model_folder: Path) -> None:
    with started(model_folder, 'aliases=["gpt-4", "small"]', 'tags=["chat"]') as client:
        [model] = client.get("/v1/models").json()["data"]
        assert (model["aliases"], model["tags"]) == (["tiny", "gpt-4", "small"], ["chat"])
        for name in model["aliases"]:
            assert chat(client, model=name)["model"] == "tiny"
            assert client.get(f"/v1/models/{name}").json()["id"] == "tiny"
        assert client.post("/v1/chat/completions", json={"messages": MESSAGES, "model": "huge"}).status_code == 404


def test_parts_can_be_left_out(model_folder: Path) -> None:
    with started(model_folder, "page=false", "metrics=false", "slots=false") as client:
        assert [client.get(path).status_code for path in ("/", "/page/about")] == [404, 404]
        for path in ("/metrics", "/slots"):
            reply = client.get(path)
            assert reply.status_code == 501 and f"without {path}" in reply.json()["error"]["message"]
        assert chat(client)["choices"]


def test_every_chat_can_show_its_prompt_and_its_times(model_folder: Path) -> None:
    with started(model_folder, "verbose=true", "timings=true") as client:
        shown = client.post("/apply-template", json={"messages": MESSAGES}).json()
        whole = chat(client, ignore_eos=True)
        assert whole["__verbose"] == shown and "__verbose" not in chat(client, verbose=False)
        times = whole["metrics"]
        assert times["generation_time_ms"] > 0 and times["time_to_first_token_ms"] > times["queue_time_ms"] > 0
        assert times["mean_itl_ms"] == pytest.approx(times["generation_time_ms"] / 5)
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 1}
        lines = client.post("/v1/chat/completions", json={"messages": MESSAGES, **options}).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert ["metrics" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert "mean_itl_ms" not in chunks[-1]["metrics"]  # one token has no time between two


def test_an_answer_can_go_on_from_a_last_message_of_the_assistant(model_folder: Path) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "The answer"}]
    with started(model_folder, "continue_final_message=true", "verbose=true") as client:
        assert chat(client, messages=begun)["__verbose"]["prompt"].endswith("</think>The answer")
        assert chat(client, messages=begun, add_generation_prompt=True)["__verbose"]["prompt"].endswith("<think>")
        twice = client.post("/v1/chat/completions", json={"messages": [*begun, begun[-1]]})
        assert twice.status_code == 400 and "not from two" in twice.json()["error"]["message"]
    with started(model_folder, "verbose=true") as client:
        assert chat(client, messages=begun)["__verbose"]["prompt"].endswith("<think>")


@pytest.mark.parametrize(("most", "good", "bad"), [(2, 2, 3), (25, 25, 26), (-1, -1, None)])
def test_how_many_rivals_a_request_may_ask_for(model_folder: Path, most: int, good: int, bad: int | None) -> None:
    with started(model_folder, f"max_logprobs={most}") as client:
        [token] = chat(client, logprobs=True, top_logprobs=good, max_tokens=1, reasoning_effort="none")["choices"][0][
            "logprobs"
        ]["content"]
        vocabulary = client.get("/tokenizer_info").json()["vocab_size"]
        assert len(token["top_logprobs"]) == (vocabulary if good == -1 else good)
        rows = chat(client, prompt_logprobs=good, max_tokens=1)["prompt_logprobs"]
        assert len(rows[1]) >= (vocabulary if good == -1 else good)
        for fields in ({"logprobs": True, "top_logprobs": bad}, {"prompt_logprobs": bad}):
            reply = client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
            assert reply.status_code == (200 if bad is None else 400)


def test_one_server_listens_at_several_addresses(model_folder: Path) -> None:
    with started(model_folder, host="127.0.0.1,127.0.0.2") as client:
        other = f"http://127.0.0.2:{client.base_url.port}/health"
        reply = httpx.get(other, headers={"host": "localhost"}, trust_env=False)
        assert reply.status_code == 200 and client.get("/health").status_code == 200


@pytest.mark.parametrize("host", ["", "127.0.0.1,", ",::1"])
def test_an_empty_address_is_refused(model_folder: Path, host: str) -> None:
    with pytest.raises(LiaoyuanError, match="names an empty address"):
        open_server(model_folder, host, port=0)


def test_a_list_that_is_written_as_a_word_is_told_its_form() -> None:
    with pytest.raises(LiaoyuanError, match="'aliases' in the command line is wrong: write a list"):
        load(Settings, None, ["aliases=gpt-4"])


def test_a_server_that_nobody_asks_sleeps_and_wakes_for_a_request(model_folder: Path) -> None:
    with started(model_folder, "sleep_after=0.05", "sampling.seed=1") as client:

        def asleep() -> bool:
            return bool(client.get("/props").json()["is_sleeping"])

        first = text(client)
        wait_until(asleep)
        assert client.get("/ready").status_code == client.get("/health").status_code == 200
        assert text(client) == first
        wait_until(asleep)
        assert client.post("/v1/embeddings", json={"input": "The answer"}).status_code == 200
        wait_until(asleep)
        client.post("/tokenize", json={"prompt": "The answer"})
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_setting_that_nobody_knows_names_the_nearest_right_one(model_folder: Path) -> None:
    server = Verb("serve", "--model", model_folder, "--set", "sampling.sed=1")
    assert "did you mean 'seed'" in server.communicate()[1] and server.returncode != 0
    with pytest.raises(LiaoyuanError, match="page"):
        load(Settings, None, ["page=maybe"])


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_given_tokens(model_folder: Path, stream: bool) -> None:
    own = {"logprob_token_ids": [5, 300], "allowed_token_ids": [42], "return_tokens_as_token_ids": True}
    with started(model_folder) as client, openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x") as official:
        asked: dict[str, Any] = {
            "model": "tiny",
            "max_tokens": 2,
            "temperature": 0,
            "stream": stream,
            "extra_body": own,
        }
        reply = official.chat.completions.create(messages=MESSAGES, logprobs=True, reasoning_effort="none", **asked)
        choices = [part.choices[0] for part in (reply if stream else [reply]) if part.choices]
        told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        assert [token.token for token in told] == ["token_id:42"] * 2
        named = {"token_id:42", "token_id:5", "token_id:300"}
        assert all({rival.token for rival in token.top_logprobs} == named for token in told)
        reply = official.completions.create(prompt="The answer", logprobs=1, **asked)
        rows = [row for part in (reply if stream else [reply]) for row in part.choices[0].logprobs.top_logprobs]
        assert len(rows) == 2 and all(row.keys() == named for row in rows)
        for wrong in ({"logprob_token_ids": [5]}, {"logprobs": True, "logprob_token_ids": [99999]}):
            refused = client.post("/v1/chat/completions", json={"messages": MESSAGES, **wrong})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "logprob_token_ids"
