"""Promises of `serve` and `chat` at the command line: mistakes are one sentence, Ctrl-C is a clean end."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from liaoyuan.cli.chat import chat
from liaoyuan.cli.quickstart import quickstart
from liaoyuan.data.tokenizer import Tokenizer, train_tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.serving import open_server, read_about
from tests.serving.conftest import TEXT, scripted
from tests.verbs import Verb


def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def test_a_port_in_use_is_named(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LiaoyuanError, match=f"Port {port} of 127.0.0.1 is in use"):
            open_server(model_folder, port=port)


def test_a_refused_server_leaves_its_port_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(LiaoyuanError, match="does not exist"):
        open_server(tmp_path / "missing", port=port)
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port(model_folder: Path, port: int) -> None:
    with pytest.raises(LiaoyuanError, match="from 0 to 65535"):
        open_server(model_folder, port=port)


def test_a_torn_weight_file(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LiaoyuanError, match="safetensors"):
        open_server(folder, port=0)


def test_a_tokenizer_of_another_model(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path)
    train_tokenizer([TEXT, "other words altogether " * 5], 350).save(folder)
    with pytest.raises(LiaoyuanError, match="disagree"):
        open_server(folder, port=0)


def test_what_the_model_says_of_itself(model_folder: Path, tmp_path: Path) -> None:
    folder = copied(model_folder, tmp_path)
    about = {"about": {"en": "adds", "zh": "会加法"}, "examples": ["1 + 1", {"en": "two", "zh": "二"}]}
    (folder / "liaoyuan.json").write_text(json.dumps(about), encoding="utf-8")
    assert [example.zh for example in read_about(folder).examples] == ["1 + 1", "二"]
    (folder / "liaoyuan.json").write_text('{"exampels": []}')
    with pytest.raises(LiaoyuanError, match="did you mean 'examples'"):
        read_about(folder)


def test_serve_ends_cleanly_on_ctrl_c(model_folder: Path) -> None:
    words = ("--model", model_folder, "--port", "0", "--device", "cpu", "--name", "tiny", "--json")
    with Verb("serve", *words) as server:
        assert server.stdout and server.stderr
        said = json.loads(server.stdout.readline())
        answering = {"prompt": "The", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 128}
        with httpx.stream("POST", said["api"] + "/completions", json=answering, trust_env=False) as reply:
            assert reply.status_code == 200
            server.send_signal(signal.SIGINT)
            assert "The engine is shutting down." in reply.read().decode()
        assert server.wait(20) == 0
        assert server.stderr.read() == ""


def test_keys_and_sizes_are_set_at_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice first-secret\n")
    options = ["--api-key-file", str(keys), "--context-length", "64", "--max-sequences", "4", "--cache-gb", "0.01"]
    with Verb("serve", "--model", model_folder, "--port", "0", "--json", *options) as server:
        assert server.stdout
        api = json.loads(server.stdout.readline())["api"]
        try:
            assert httpx.get(api + "/models", trust_env=False).status_code == 401
            headers = {"Authorization": "Bearer first-secret"}
            model = httpx.get(api + "/models", headers=headers, trust_env=False).json()["data"][0]
            assert model["max_model_len"] == 64
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


def test_a_context_that_does_not_fit_is_refused(model_folder: Path) -> None:
    with pytest.raises(LiaoyuanError, match="1000 is more than model and cache hold"):
        open_server(model_folder, port=0, context_length=1000)


def test_the_help_of_serve_fits_a_screen_and_is_in_groups() -> None:
    command = [sys.executable, "-m", "liaoyuan", "serve", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"})
    assert len(said.stdout.splitlines()) <= 40
    assert "Who may ask, and how much:" in said.stdout and "The engine's sizes:" in said.stdout


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, url: str | None = None, model: Path | None = None) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat(model, url, "cpu", 0.5, False)


def test_chat_answers_each_line_of_a_pipe(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(tokenizer, "7 + 5 = 12</think>The answer is 42.") as (url, runner):
        talk(monkeypatch, "What is 17 + 25?\n\n/fast\nAnd now?\n/nwe\n/new\nHello\n/quit\nnever\n", url + "/v1")
        thinks = [request.prompt[-1] == tokenizer.think_ids[0] for request in runner.requests]
        assert thinks == [True, False, False]
        asked = [tokenizer.decode(request.prompt) for request in runner.requests]
        assert "What is 17" in asked[1] and "What is 17" not in asked[2]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == ["7 + 5 = 12", "The answer is 42."]
    assert "did you mean '/new'" in printed.err


def test_chat_talks_to_a_model_folder(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, "What is 17 + 25?\n" + "long " * 300, model=model_folder)
    printed = capsys.readouterr()
    assert printed.out.strip() and "context size (256 tokens)" in printed.err


def test_chat_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LiaoyuanError, match="There is no OpenAI-compatible server"):
        talk(monkeypatch, "", "http://127.0.0.1:9/v1")
    with pytest.raises(LiaoyuanError, match="Give either"):
        talk(monkeypatch, "")


def test_a_quickstart_whose_port_is_in_use_is_refused_before_it_works(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LiaoyuanError, match=r"in use.*--port"):
        quickstart(run=tmp_path / "run", port=taken.getsockname()[1], serve=True)
    assert not (tmp_path / "run").exists()
