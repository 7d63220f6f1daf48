"""Adapters over HTTP: loaded and unloaded while the server answers, chosen by the name of the model."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from liaoyuan.checkpoint import load_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import score
from liaoyuan.inference import Engine, Request, SamplingParams
from liaoyuan.serving import open_server
from tests.inference.adapter_files import write_adapter


@pytest.fixture(scope="module")
def shelf(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(3):
        write_adapter(folder / f"a{seed}", model_folder, seed=seed)
    return folder


@pytest.fixture(scope="module")
def url(model_folder: Path, shelf: Path) -> Iterator[str]:
    with open_server(
        model_folder, port=0, device="cpu", name="base", adapters={"first": shelf / "a0"}, adapter_folder=shelf
    ) as server:
        yield server.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", http_client=httpx.Client(trust_env=False)) as made:
        yield made


def post(url: str, path: str, **body: object) -> httpx.Response:
    return httpx.post(url + path, json=body, trust_env=False)


def answer(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="The answer is", max_tokens=12, temperature=0).choices[0].text


def names(client: openai.OpenAI) -> list[str]:
    return [model.id for model in client.models.list()]


def test_a_request_chooses_its_adapter_by_the_name_of_the_model(
    client: openai.OpenAI, model_folder: Path, shelf: Path, tokenizer: Tokenizer
) -> None:
    engine = Engine(load_model(model_folder))
    engine.load_adapter("first", shelf / "a0")
    prompt = tuple(tokenizer.encode("The answer is", add_special_tokens=True))
    for name, adapter in (("base", ""), ("first", "first")):
        sampling = SamplingParams(12, 0.0, stop_token_ids=tokenizer.eos_ids)
        expected = engine.generate([Request(0, prompt, sampling, adapter=adapter)])[0]
        assert answer(client, name) == tokenizer.decode(expected.tokens)
    assert answer(client, "base") != answer(client, "first")
    tokens = {"token_ids": list(prompt), "sampling_params": {"max_tokens": 12, "temperature": 0}, "model": "first"}
    reply = httpx.post(str(client.base_url).replace("/v1/", "/inference/v1/generate"), json=tokens, trust_env=False)
    assert reply.json()["choices"][0]["token_ids"] == expected.tokens
    chats = {
        name: client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=8
        )
        for name in ("base", "first")
    }
    first, base = (chats[name].choices[0].message for name in ("first", "base"))
    assert first != base
    assert chats["first"].model == "first"


def test_prompts_are_scored_by_the_adapter_that_is_named(
    client: openai.OpenAI, model_folder: Path, shelf: Path
) -> None:
    engine, prompt = Engine(load_model(model_folder)), [5, 9, 20, 33, 4, 8]
    engine.load_adapter("first", shelf / "a0")
    for name in ("base", "first"):
        reply = client.completions.create(model=name, prompt=prompt, max_tokens=1, echo=True, logprobs=1, temperature=0)
        with engine.adapters.everywhere("" if name == "base" else name):
            assert reply.choices[0].logprobs.token_logprobs[1:-1] == score(engine.model, [prompt])[0]
    with pytest.raises(openai.NotFoundError):  # not silently the base model's
        client.embeddings.create(model="first", input="hi")


def test_adapters_are_loaded_listed_and_unloaded(client: openai.OpenAI, url: str) -> None:
    assert names(client) == ["base", "first"]
    assert client.models.retrieve("first").parent == "base"
    reply = post(url, "/v1/load_lora_adapter", lora_name="second", lora_path="a1")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'second' added successfully.")
    assert names(client) == ["base", "first", "second"]
    as_second = answer(client, "second")
    assert post(url, "/v1/load_lora_adapter", lora_name="second", lora_path="a2").status_code == 400
    again = post(url, "/v1/load_lora_adapter", lora_name="second", lora_path="a2", load_inplace=True)
    assert again.status_code == 200
    assert answer(client, "second") != as_second
    assert post(url, "/v1/unload_lora_adapter", lora_name="second").status_code == 200
    assert names(client) == ["base", "first"]
    with pytest.raises(openai.NotFoundError, match="this server has 'base', 'first'"):
        answer(client, "second")
    assert post(url, "/v1/unload_lora_adapter", lora_name="second").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("../elsewhere", 403, "from inside the folder"),
        ("/etc", 403, "from inside the folder"),
        ("nothing", 400, "does not exist"),
        (".", 400, "has no adapter_config.json"),
        ("a\0b", 400, "no path"),
    ],
)
def test_what_lies_elsewhere_is_not_read(url: str, path: str, status: int, message: str) -> None:
    reply = post(url, "/v1/load_lora_adapter", lora_name="x", lora_path=path)
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]


def test_a_link_does_not_lead_out_of_the_folder(url: str, shelf: Path, tmp_path: Path, model_folder: Path) -> None:
    (shelf / "link").symlink_to(write_adapter(tmp_path / "outside", model_folder))
    assert post(url, "/v1/load_lora_adapter", lora_name="x", lora_path="link").status_code == 403


def test_clients_change_nothing_unless_the_server_lets_them(model_folder: Path, shelf: Path) -> None:
    with open_server(model_folder, port=0, device="cpu", adapters={"a": shelf / "a0"}) as server:
        for path in ("load", "unload"):
            body = {"lora_name": "a"} | ({"lora_path": "a1"} if path == "load" else {})
            assert post(server.url, f"/v1/{path}_lora_adapter", **body).status_code == 403


def test_a_folder_for_adapters_that_is_not_there_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="--lora-folder does not exist"):
        open_server(model_folder, port=0, device="cpu", adapter_folder=tmp_path / "nothing")


def test_a_bad_adapter_is_known_before_the_server_opens(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="does not exist"):
        open_server(model_folder, port=0, device="cpu", adapters={"a": tmp_path / "nothing"})
