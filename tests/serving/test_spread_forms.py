"""Forms and tools of a model over two processes: what one process says, and held as there."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from liaoyuan.checkpoint import save_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import EngineConfig
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.serving import open_server
from tests.serving.test_processes import children, serve
from tests.serving.test_structured import ASKED, CLOCK, FAST, PLACE, WEATHER

SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}}
CALL = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False}
FORMS: list[dict[str, Any]] = [
    SCHEMA,
    SCHEMA | {"temperature": 1.3, "top_p": 0.9, "logprobs": True, "top_logprobs": 3},
    {"guided_regex": "[a-f]{3}-[0-9]{2}"},
    {"grammar": 'root ::= "ja" | "nein"'},
    CALL,
    CALL | {"seed": 5, "temperature": 0.7},
    {"guided_choice": ["ja", "nein"], "chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 7},
    {"max_tokens": 30, "repetition_penalty": 1.2, "bad_words": ["a"], "logit_bias": {"20": 3}},
]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose padded vocabulary two processes can share."""
    size = tokenizer.vocab_size + 32 + tokenizer.vocab_size % 2
    words, folder = (tmp_path_factory.mktemp(name) for name in ("tokenizer", "tiny"))
    tokenizer.save(words)
    save_model(
        initialise(Decoder(ModelConfig("qwen3", size, 32, 64, 2, 4, 2, 8, 2048, qk_norm=True)), 0), folder, words
    )
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[str]:
    with open_server(folder, port=0, engine=EngineConfig(max_sequences=8)) as server:
        yield server.url + "/v1"


@pytest.fixture(scope="module")
def together(folder: Path) -> Iterator[str]:
    with serve(folder, "--tp", "2", "--max-sequences", "8") as (_, api):
        yield api


def choice(api: str, form: dict[str, Any]) -> dict[str, Any]:
    """Return what a server answers, without what differs from answer to answer."""
    asked = {"messages": ASKED, "seed": 1, "max_tokens": 900, **FAST, **form}
    reply = httpx.post(api + "/chat/completions", json=asked, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]
    for call in found["message"].get("tool_calls") or ():
        call.pop("id")
    return found


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_forms_and_tools_are_answered_as_by_one_process(alone: str, together: str, form: dict[str, Any]) -> None:
    one, two = choice(alone, form), choice(together, form)
    assert two["message"] == one["message"] and two["finish_reason"] == one["finish_reason"]
    if form.items() >= SCHEMA.items():
        jsonschema.validate(json.loads(two["message"]["content"]), PLACE)
    if "tools" in form:
        (call,) = two["message"]["tool_calls"]
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, CLOCK)}
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])


def test_a_form_that_cannot_be_held_harms_nobody(together: str) -> None:
    asked = {"messages": ASKED, "max_tokens": 60, "guided_regex": "[z-a]"}
    reply = httpx.post(together + "/chat/completions", json=asked, timeout=60, trust_env=False)
    assert reply.status_code == 400 and "regular expression cannot be held" in reply.json()["error"]["message"]
    assert choice(together, FORMS[3])["message"]["content"] in ("ja", "nein")


def test_whoever_waits_for_a_form_is_told_when_a_process_dies(folder: Path) -> None:
    asked = {"messages": ASKED, "stream": True, "max_tokens": 1900, "guided_regex": "[a-z]{1800}", **FAST}
    with serve(folder, "--tp", "2") as (server, api):
        (follower,) = children(server.pid)  # before the process that compiles grammars is one of them
        with httpx.stream("POST", api + "/chat/completions", json=asked, timeout=60, trust_env=False) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(follower, signal.SIGKILL)
            said = "".join(lines)
        assert "A process of this model failed" in said and said.endswith("data: [DONE]")
        assert server.wait(30) == LiaoyuanError.exit_code
