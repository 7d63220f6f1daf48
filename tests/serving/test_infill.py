"""Promises of filling in the middle: llama.cpp's `/infill`, and the `suffix` of `/v1/completions`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from liaoyuan.checkpoint import save_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.serving import open_server
from tests.serving.conftest import CONTEXT

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer has Qwen's tokens for filling in the middle."""
    root = tmp_path_factory.mktemp("filling")
    tokenizer.save(root)
    definition = json.loads((root / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = tokenizer.vocab_size
    definition["added_tokens"] += [{"id": first + n, "content": mark, **plain} for n, mark in enumerate(MARKS)]
    (root / "tokenizer.json").write_text(json.dumps(definition))
    config = ModelConfig("qwen3", first + len(MARKS), 32, 64, 2, 4, 2, 8, CONTEXT, qk_norm=True)
    target = root / "model"
    save_model(initialise(Decoder(config), 0), target, root)
    return target


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    serving = open_server(folder, port=0, name="tiny", engine=EngineConfig(max_sequences=4))
    with serving as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as made:
        yield made


def infill(client: httpx.Client, **fields: Any) -> Any:
    asked = {"input_prefix": "What is ", "input_suffix": "The answer is 42.", "n_predict": 4, "seed": 1, **fields}
    reply = client.post("/infill", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_the_gap_comes_after_both_texts_in_the_order_that_models_are_taught(client: httpx.Client) -> None:
    told = infill(client, prompt="17 ", return_tokens=True)
    assert told["prompt"] == "<|fim_prefix|>What is <|fim_suffix|>The answer is 42.<|fim_middle|>17 "
    assert len(told["tokens"]) == told["tokens_predicted"] <= 4


def test_other_files_come_first_under_their_names(client: httpx.Client) -> None:
    extra = [{"filename": "sum.txt", "text": "17 + 25\n"}, {"text": "write 2"}]
    files = "<|file_sep|>sum.txt\n17 + 25\n<|file_sep|>file\nwrite 2<|file_sep|>file\n"
    assert infill(client, input_extra=extra)["prompt"].startswith(f"<|repo_name|>repository\n{files}<|fim_prefix|>")


def test_what_is_far_from_the_gap_goes_away_first(client: httpx.Client) -> None:
    before, after = "far " * 300 + "near", "near" + " far" * 300
    extra = [{"filename": "a", "text": "other " * 300}]
    told = infill(client, input_prefix=before, input_suffix=after, input_extra=extra)
    left, right = told["prompt"].removesuffix("<|fim_middle|>").split("<|fim_suffix|>")
    assert left.endswith("near") and right.startswith("near") and len(left) > len(right)
    assert "other" not in left and told["tokens_evaluated"] == CONTEXT - 4
    told = infill(client, input_extra=extra)
    assert "What is <|fim_suffix|>The answer is 42." in told["prompt"] and "other" in told["prompt"]


def test_where_no_room_is_left_for_the_answer_both_are_counted(client: httpx.Client) -> None:
    asked = {"input_prefix": "a", "input_suffix": "b", "n_predict": CONTEXT}
    error = client.post("/infill", json=asked).json()["error"]
    assert error["n_prompt_tokens"] < 10 and f"{CONTEXT} more are asked for" in error["message"]


def test_a_filling_ends_where_the_model_begins_another_part(client: httpx.Client, folder: Path) -> None:
    ends = infill(client)["generation_settings"]
    end = Tokenizer.load(folder).token_id("<|file_sep|>")
    told = infill(client, n_predict=50, logit_bias=[[end, 100]], return_tokens=True)
    assert ends["n_predict"] == 4 and told["stop_type"] == "eos" and told["tokens_predicted"] == 1


def test_a_completion_may_have_a_suffix(client: httpx.Client) -> None:
    asked = {"prompt": "What is ", "suffix": "The answer is 42.", "max_tokens": 4, "seed": 1}
    reply = client.post("/v1/completions", json={**asked, "return_token_ids": True}).json()["choices"][0]
    own = client.post("/detokenize", json={"tokens": reply["prompt_token_ids"]}).json()["prompt"]
    assert own == infill(client)["prompt"] and reply["text"] == infill(client)["content"]
    assert client.post("/v1/completions", json={**asked, "prompt": [5, 6]}).status_code == 400


@pytest.mark.parametrize("extra", [{}, {"filename": "a"}, {"filename": 1, "text": "a"}, {"text": 1}, "a"])
def test_files_without_a_text_are_refused(client: httpx.Client, extra: object) -> None:
    asked = {"input_prefix": "a", "input_suffix": "b", "input_extra": [extra]}
    assert client.post("/infill", json=asked).status_code == 400


def test_all_texts_that_are_missing_are_named_at_once(client: httpx.Client) -> None:
    error = client.post("/infill", json={"n_predict": 1}).json()["error"]
    assert error["message"] == "The fields 'input_prefix' and 'input_suffix' are missing."
    assert error["param"] == "input_prefix" and error["code"] == "missing_required_parameter"
    error = client.post("/infill", json={"input_prefix": "a"}).json()["error"]
    assert error["message"] == "The field 'input_suffix' is missing."


def test_a_model_without_these_tokens_says_so(model_folder: Path) -> None:
    with open_server(model_folder, port=0, engine=EngineConfig(max_sequences=2)) as server:
        for path, asked in (
            ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
            ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ):
            reply = httpx.post(server.url + path, json=asked, trust_env=False)
            assert reply.status_code == 400 and "no tokens for filling in the middle" in reply.text


def test_a_text_can_hold_a_mark_as_plain_characters(client: httpx.Client, folder: Path) -> None:
    tokens = Tokenizer.load(folder)
    asked = {"input_prefix": "a<|fim_middle|>", "input_suffix": "b", "n_predict": 1}
    counted = client.post("/infill", json=asked).json()["tokens_evaluated"]
    assert counted == len(tokens.encode("a<|fim_middle|>")) + len(tokens.encode("b")) + 3
