"""Token ids in and out, and the state of the engine, over HTTP, as a trainer uses them."""

import base64
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, initialise
from liaoyuan.models.config import Experts
from liaoyuan.serving import open_server

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def client(model_folder: Path) -> Iterator[httpx.Client]:
    config = EngineConfig(max_sequences=4)
    with (
        open_server(model_folder, port=0, engine=config, control=True) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as made,
    ):
        yield made


def generate(client: httpx.Client, **fields: object) -> dict:
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 12, "seed": 3, "ignore_eos": True}, **fields}
    reply = client.post("/inference/v1/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_tokens_come_as_the_engine_gives_them(client: httpx.Client, model_folder: Path) -> None:
    asked = SamplingParams(max_tokens=12, seed=3, top_logprobs=2, prompt_logprobs=1, return_masks=True, top_k=9)
    expected = Engine(load_model(model_folder)).generate([Request(0, tuple(PROMPT), asked)])[0]
    own = {"max_tokens": 12, "seed": 3, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1}
    reply = generate(client, sampling_params={**own, "return_masks": True, "top_k": 9})
    choice = reply["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == (expected.tokens, "length")
    assert choice["logprobs"] == expected.logprobs
    assert [[tuple(pair) for pair in top] for top in choice["top_logprobs"]] == expected.top_logprobs
    assert choice["versions"] == [0] * 12
    masks = [np.frombuffer(base64.b64decode(mask), dtype=np.int32) for mask in choice["masks"]]
    assert all(np.array_equal(mask, other) for mask, other in zip(masks, expected.masks, strict=True))
    assert expected.prompt is not None
    assert reply["prompt_logprobs"]["logprobs"] == expected.prompt.logprobs
    assert reply["usage"]["completion_tokens"] == 12


def test_a_stream_is_the_whole_in_pieces(client: httpx.Client) -> None:
    whole = generate(client)["choices"][0]
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 12, "seed": 3, "ignore_eos": True}, "stream": True}
    with client.stream("POST", "/inference/v1/generate", json=body) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices = [httpx.Response(200, text=line).json()["choices"][0] for line in lines[:-1]]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_weights_are_updated_between_two_answers(client: httpx.Client, model_folder: Path, tmp_path: Path) -> None:
    model = load_model(model_folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.3)
    save_model(model, tmp_path / "new")
    before = client.get("/weights").json()
    assert before["version"] == 0
    assert client.post("/update_weights", json={"folder": str(tmp_path / "new"), "version": 7}).json()["version"] == 7
    after = client.get("/weights").json()
    assert (after["version"], after["checksum"]) == (7, Engine(model).checksum())
    assert after["checksum"] != before["checksum"]
    choice = generate(client)["choices"][0]
    asked = SamplingParams(max_tokens=12, seed=3)
    assert choice["token_ids"] == Engine(model).generate([Request(0, tuple(PROMPT), asked)])[0].tokens
    assert choice["versions"] == [7] * 12


def test_a_wrong_update_is_a_conflict_and_changes_nothing(client: httpx.Client, tmp_path: Path) -> None:
    before, answer = client.get("/weights").json(), generate(client)["choices"]
    reply = client.post("/update_weights", json={"folder": str(tmp_path / "nowhere")})
    assert reply.status_code == 409
    assert "nowhere" in reply.json()["error"]["message"]
    assert client.get("/weights").json() == before
    assert generate(client)["choices"] == answer


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(client: httpx.Client, model_folder: Path, level: int) -> None:
    answer = generate(client)["choices"]
    assert client.post("/sleep", json={"level": level}).json()["state"] == "asleep"
    assert client.post("/resume").status_code == 409
    state = client.post("/wake_up").json()["state"]
    assert state == ("ready" if level == 1 else "paused")
    if level == 2:
        assert client.post("/resume").status_code == 409
        assert client.get("/weights").status_code == 409
        assert client.post("/update_weights", json={"folder": str(model_folder)}).status_code == 200
        assert client.post("/resume").json()["state"] == "ready"
        assert [dict(one, versions=None) for one in generate(client)["choices"]] == [
            dict(one, versions=None) for one in answer
        ]
    else:
        assert generate(client)["choices"] == answer


def test_who_asks_while_it_is_paused_waits(client: httpx.Client) -> None:
    answer = generate(client)["choices"]
    assert client.post("/pause", json={"mode": "keep"}).json()["state"] == "paused"
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(generate(client)["choices"]))
    waiting.start()
    while client.get("/health").json()["open"] == 0:
        pass
    assert client.post("/resume").json()["state"] == "ready"
    waiting.join(timeout=60)
    assert found == [answer]


def test_a_request_whose_time_is_over_says_so(client: httpx.Client) -> None:
    client.post("/pause", json={"mode": "wait"})
    assert generate(client, timeout=0.01)["choices"][0]["finish_reason"] == "timeout"


def test_control_is_off_unless_asked_for(model_folder: Path) -> None:
    with open_server(model_folder, port=0) as server:
        for path in ("/pause", "/sleep", "/update_weights"):
            assert httpx.post(server.url + path, json={}, trust_env=False).status_code in (404, 405)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [999999]}, "vocabulary"),
        ({"token_ids": [1], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"token_ids": [1], "sampling_params": {"logit_bias": {"x": 1.0}}}, "logit_bias"),
        ({"token_ids": [1], "sampling_params": {"temprature": 1.0}}, "temprature"),
    ],
)
def test_what_has_no_meaning_is_refused(client: httpx.Client, body: dict, message: str) -> None:
    reply = client.post("/inference/v1/generate", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_dataclasses_and_bodies_agree() -> None:
    from liaoyuan.serving.generate import TokenSampling

    known = {field.name for field in dataclasses.fields(SamplingParams)} - {"constraint", "top_logprobs"}
    assert known == TokenSampling.model_fields.keys() - {"ignore_eos", "logprobs"}


@pytest.mark.parametrize("how", ["ngram", "draft"])
def test_a_server_that_guesses_gives_the_same_answers(client: httpx.Client, model_folder: Path, how: str) -> None:
    config = EngineConfig(speculate="ngram" if how == "ngram" else "")
    draft = model_folder if how == "draft" else None
    with (
        open_server(model_folder, port=0, engine=config, draft=draft) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as guessing,
    ):
        expected, found = generate(client)["choices"][0], generate(guessing)["choices"][0]
        assert found["token_ids"] == expected["token_ids"]
        assert guessing.get("/health").json()["guessed_right"] > 0 or how == "ngram"


def test_a_server_guesses_with_the_models_own_layer(model_folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(load_model(model_folder).config, model_type="glm4_moe", qk_norm=True, further_layers=1)
    experts = Experts(4, 2, 16, scoring="sigmoid", group_best=2, dense_layers=(0,))
    rotary = dataclasses.replace(config.rotary, partial=0.5)
    config = dataclasses.replace(config, experts=experts, rotary=rotary, further_normed=True)
    save_model(initialise(Decoder(config), 0), tmp_path / "model", model_folder)
    answers, guessed = [], 0
    for how in ("", "mtp"):
        sizes = EngineConfig.model_validate({"speculate": how})
        with (
            open_server(tmp_path / "model", port=0, engine=sizes) as server,
            httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client,
        ):
            answers.append(generate(client)["choices"][0]["token_ids"])
            guessed = client.get("/health").json()["guessed_tokens"]
    assert answers[0] == answers[1] and guessed > 0
