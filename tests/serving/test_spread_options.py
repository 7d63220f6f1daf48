"""`serve --tp` with weights of few bits, adapters and guessing, by the command line."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from liaoyuan.checkpoint import save_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import EngineConfig
from liaoyuan.models import Decoder, ModelConfig, Quantisation, initialise, read_config
from liaoyuan.parallel import Layout
from liaoyuan.serving import open_server
from tests.inference.adapter_files import write_adapter
from tests.serving.test_processes import children, serve


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words, folder = (tmp_path_factory.mktemp(name) for name in ("tokenizer", "tiny"))
    tokenizer.save(words)
    config = ModelConfig("qwen3", tokenizer.vocab_size, 64, 64, 2, 4, 2, 16, 256, qk_norm=True)
    save_model(initialise(Decoder(config), 0), folder, words)
    return folder


@pytest.fixture(scope="module")
def shelf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three adapters, of which one is torn."""
    made = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second", "torn")):
        write_adapter(made / name, model, seed=seed)
    weights = made / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return made


@pytest.fixture(scope="module")
def options(model: Path, shelf: Path) -> list[str]:
    adapters = ["--lora", f"first={shelf / 'first'}", "--lora-folder", str(shelf)]
    return ["--name", "tiny", "--tp", "2", "--quantise", "int8", "--draft", str(model), *adapters]


@pytest.fixture(scope="module")
def alone(model: Path, shelf: Path) -> Iterator[str]:
    with open_server(
        model,
        port=0,
        name="tiny",
        engine=EngineConfig(max_sequences=8),
        quantisation=Quantisation("int8"),
        adapters={"first": shelf / "first"},
        adapter_folder=shelf,
    ) as server:
        yield server.url + "/v1"


def post(api: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(api + path, json=body, timeout=60, trust_env=False)


def texts(api: str, names: tuple[str, ...]) -> list[str]:
    asked = {"prompt": ["The answer", "What is 17"], "max_tokens": 24, "seed": 4, "logprobs": 2}
    return [
        choice["text"] for name in names for choice in post(api, "/completions", model=name, **asked).json()["choices"]
    ]


def test_they_are_loaded_refused_and_unloaded_in_all_processes(model: Path, alone: str, options: list[str]) -> None:
    with serve(model, *options) as (server, api):
        assert texts(api, ("tiny", "first")) == texts(alone, ("tiny", "first"))
        for some in (api, alone):
            refused = post(some, "/load_lora_adapter", lora_name="torn", lora_path="torn")
            assert refused.status_code == 400 and "truncated or corrupt" in refused.text
            assert post(some, "/load_lora_adapter", lora_name="second", lora_path="second").status_code == 200
        names = ("tiny", "first", "second")
        assert texts(api, names) == texts(alone, names)
        assert len(set(texts(api, names))) == 6
        for some in (api, alone):
            assert post(some, "/unload_lora_adapter", lora_name="first").status_code == 200
            assert post(some, "/completions", model="first", prompt="x", max_tokens=2).status_code == 404
        assert texts(api, ("second", "tiny")) == texts(alone, ("second", "tiny"))
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert server.stderr and server.stderr.read() == ""


def test_an_adapter_that_comes_when_a_process_is_dead_ends_the_server(model: Path, options: list[str]) -> None:
    with serve(model, *options) as (server, api):
        os.kill(children(server.pid)[0], signal.SIGKILL)
        with contextlib.suppress(httpx.TransportError):  # the server may be at its end before it answers
            assert post(api, "/load_lora_adapter", lora_name="second", lora_path="second").status_code != 200
        assert server.wait(30) == LiaoyuanError.exit_code
        assert server.stderr and "Process 1 of 2 of the model was killed by SIGKILL" in server.stderr.read()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantisation": Quantisation("int4")}, "splits a group of 32 that has one scale"),
        ({"engine": EngineConfig(speculate="mtp")}, "no layer for predicting the token after the next"),
    ],
    ids=["int4", "mtp"],
)
def test_what_does_not_fit_is_refused_before_processes_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    config = ModelConfig("qwen3", read_config(model).vocab_size, 32, 64, 2, 4, 2, 8, 256, qk_norm=True)
    save_model(initialise(Decoder(config), 0), tmp_path / "narrow", model)
    with pytest.raises(LiaoyuanError, match=words):
        open_server(tmp_path / "narrow", port=0, layout=Layout(tp=2), **options)
