"""Oracle: the beam search of `transformers`, on the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import open_server

PROMPT = "The answer"


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[httpx.Client]:
    serving = open_server(model_folder, port=0, name="tiny", engine=EngineConfig(max_sequences=8))
    with serving as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as made:
        yield made


def beams(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    asked = {"prompt": PROMPT, "use_beam_search": True, "max_tokens": 6, "return_token_ids": True, **fields}
    reply = client.post("/v1/completions", json=asked)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"])


@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (2, 1.0), (5, 1.0), (5, 0.0)])
def test_the_same_continuations_as_transformers(
    client: httpx.Client, model_folder: Path, tokenizer: Tokenizer, width: int, penalty: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = tokenizer.encode(PROMPT, add_special_tokens=True)
    own = {"num_beams": width, "num_return_sequences": width, "length_penalty": penalty, "max_new_tokens": 6}
    with torch.no_grad():
        theirs = model.generate(torch.tensor([ids]), do_sample=False, pad_token_id=0, eos_token_id=None, **own)
    ours = beams(client, n=width, length_penalty=penalty, ignore_eos=True)
    assert [choice["token_ids"] for choice in ours] == theirs[:, len(ids) :].tolist()
    assert {choice["finish_reason"] for choice in ours} == {"length"}


def test_beams_of_several_prompts_do_not_mix(client: httpx.Client) -> None:
    alone = [beams(client, prompt=prompt, n=2) for prompt in (PROMPT, "What is")]
    both = beams(client, prompt=[PROMPT, "What is"], n=2)
    assert [choice["token_ids"] for choice in both] == [one["token_ids"] for group in alone for one in group]
    assert both[0]["text"] != both[1]["text"]


def test_a_beam_that_ends_competes_with_those_that_go_on(client: httpx.Client, tokenizer: Tokenizer) -> None:
    first = beams(client, n=2, ignore_eos=True, max_tokens=1)[0]["token_ids"][0]
    ended = beams(client, n=3, stop_token_ids=[first], max_tokens=4, length_penalty=0.0)
    assert (ended[0]["finish_reason"], ended[0]["token_ids"], ended[0]["text"]) == ("stop", [first], "")
    assert ended[1]["finish_reason"] == "length" and len(ended[1]["token_ids"]) == 4
    told = beams(client, n=2, logprobs=2)[0]["logprobs"]
    assert len(told["token_logprobs"]) == 6 and all(len(row) >= 2 for row in told["top_logprobs"])


@pytest.mark.parametrize(
    "field",
    [
        {"stream": True},
        {"logit_bias": {"5": 1}},
        {"best_of": 3},
        {"presence_penalty": 1},
        {"guided_regex": "[a-f]{3}"},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_what_beams_cannot_have_is_refused(client: httpx.Client, field: dict[str, Any]) -> None:
    reply = client.post("/v1/completions", json={"prompt": PROMPT, "use_beam_search": True, "n": 2, **field})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == next(iter(field))


def test_a_penalty_without_beams_is_refused_unless_it_changes_nothing(client: httpx.Client) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 1}
    assert client.post("/v1/completions", json={**asked, "length_penalty": 1}).status_code == 200
    reply = client.post("/v1/completions", json={**asked, "length_penalty": 0.5})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "length_penalty"
