"""Oracle: the official `openai` client; a random model is held to schemas, tools and budgets by the real engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from liaoyuan.checkpoint import save_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.serving import open_server
from tests.serving.conftest import scripted

ASKED = [{"role": "user", "content": "What is the weather?"}]
FAST = {"chat_template_kwargs": {"enable_thinking": False}}
PLACE = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": PLACE}}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose embedding is padded beyond its tokenizer."""
    config = ModelConfig("qwen3", tokenizer.vocab_size + 33, 32, 64, 2, 4, 2, 8, 2048, qk_norm=True)
    words, folder = (tmp_path_factory.mktemp(name) for name in ("tokenizer", "tiny"))
    tokenizer.save(words)
    save_model(initialise(Decoder(config), 0), folder, words)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with open_server(folder, port=0, name="tiny", engine=EngineConfig(max_sequences=8)) as server:
        yield server.url + "/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, seed: int = 0, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    asked = {"model": "tiny", "messages": ASKED, "seed": seed, "max_tokens": 900, **fields}
    return client.chat.completions.create(**asked, extra_body={**FAST, **(extra or {})})


class Weather(BaseModel):
    """What the pydantic oracle is asked to parse."""

    sky: Literal["sunny", "cloudy"]
    degrees: int
    windy: bool
    hours: Annotated[list[Literal["am", "pm"]], Field(max_length=2)]


@pytest.mark.parametrize("seed", range(3))
def test_parse_gives_an_object_of_the_class(client: openai.OpenAI, seed: int) -> None:
    reply = client.chat.completions.parse(
        model="tiny", messages=ASKED, seed=seed, response_format=Weather, extra_body=FAST
    )
    assert isinstance(reply.choices[0].message.parsed, Weather)
    assert reply.choices[0].finish_reason == "stop"


DIGITS = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DIGITS}}}, "json"),
        ({"response_format": {"type": "json_object", "schema": DIGITS}}, "json"),
        ({"guided_json": DIGITS}, "json"),
        ({"guided_json": json.dumps(DIGITS)}, "json"),
        ({"structured_outputs": {"json": DIGITS}}, "json"),
        ({"json_schema": DIGITS}, "json"),
        ({"guided_choice": ["ja", "nein"]}, ["ja", "nein"]),
        ({"structured_outputs": {"choice": ["ja", "nein"]}}, ["ja", "nein"]),
        ({"guided_regex": "(ja|nein)"}, ["ja", "nein"]),
        ({"guided_grammar": 'start: "ja" | "nein"'}, ["ja", "nein"]),
        ({"grammar": 'root ::= "ja" | "nein"'}, ["ja", "nein"]),
    ],
)
def test_a_form_is_held_by_whatever_name_it_is_asked_for(url: str, fields: dict[str, Any], holds: Any) -> None:
    asked = {"messages": ASKED, "temperature": 1.5, **FAST, **fields}
    chat = httpx.post(url + "/chat/completions", json=asked, timeout=60).json()["choices"][0]["message"]["content"]
    plain = httpx.post(url + "/completions", json={"prompt": "x", "max_tokens": 300, **fields}, timeout=60).json()
    for text in (chat, plain["choices"][0]["text"]):
        assert json.loads(text)["n"] in (1, 2) if holds == "json" else text in holds


def test_any_json_object(client: openai.OpenAI) -> None:
    for seed in range(4):
        choice = ask(client, seed, response_format={"type": "json_object"}, temperature=0.7).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("seed", range(3))
def test_required_tools_are_called_with_right_arguments(client: openai.OpenAI, seed: int) -> None:
    reply = ask(client, seed, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert [call.type for call in choice.message.tool_calls] == ["function"]
    called = choice.message.tool_calls[0].function
    schema = {"weather": PLACE, "clock": CLOCK["function"]["parameters"]}[called.name]
    jsonschema.validate(json.loads(called.arguments), schema)


def test_a_named_tool_is_called_and_its_answer_can_be_told(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    message = ask(client, tools=[WEATHER, CLOCK], tool_choice=named).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["weather"]
    told = [*ASKED, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    assert ask(client, messages=told, tools=[WEATHER], max_tokens=5).choices[0].message.role == "assistant"


def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    only = [{"type": "function", "function": {"name": "clock"}}]
    chosen = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": only}}
    for seed in range(3):
        reply = ask(client, seed, tools=[WEATHER, CLOCK], tool_choice=chosen, parallel_tool_calls=False)
        assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["clock"]


def test_calls_stream_as_the_client_puts_them_together(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": ASKED, "seed": 5, "tools": [WEATHER], "tool_choice": "required"}
    whole = ask(client, 5, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    with client.chat.completions.stream(**asked, parallel_tool_calls=False, extra_body=FAST) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    assert len(deltas) > 3
    assert final.choices[0].finish_reason == "tool_calls"
    first, second = (reply.choices[0].message.tool_calls[0].function for reply in (whole, final))
    assert (first.name, first.arguments) == (second.name, second.arguments)
    jsonschema.validate(json.loads(second.arguments), PLACE)


def test_a_pydantic_tool_is_parsed(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather, name="report")
    reply = client.chat.completions.parse(
        model="tiny", messages=ASKED, tools=[tool], tool_choice="required", parallel_tool_calls=False, extra_body=FAST
    )
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


def test_the_form_begins_after_the_thought_and_the_thought_has_a_budget(client: openai.OpenAI) -> None:
    asked = {"guided_choice": ["ja", "nein"], "chat_template_kwargs": {"enable_thinking": True}}
    for budget in (0, 7):
        reply = ask(client, extra={**asked, "thinking_token_budget": budget})
        assert reply.choices[0].message.content in ("ja", "nein")
        assert reply.usage.completion_tokens_details.reasoning_tokens <= budget + 1  # its closing mark
    freely = ask(client, extra={"thinking_token_budget": 3, "chat_template_kwargs": None}, max_tokens=20)
    assert freely.usage.completion_tokens_details.reasoning_tokens <= 4


def test_old_functions_are_called_by_their_old_names(client: openai.OpenAI) -> None:
    asked = {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}}
    choice = ask(client, **asked).choices[0]
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    jsonschema.validate(json.loads(choice.message.function_call.arguments), PLACE)
    chunks = [chunk.choices[0].delta.function_call for chunk in ask(client, stream=True, **asked)]
    text = "".join(chunk.arguments for chunk in chunks if chunk)
    assert [chunk.name for chunk in chunks if chunk and chunk.name] == ["weather"]
    assert text == choice.message.function_call.arguments


def test_biases_penalties_and_words_reach_the_engine(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (x,) = tokenizer.encode("x")
    always = ask(client, max_tokens=6, logit_bias={str(x): 100}, extra={"ignore_eos": True})
    assert always.choices[0].message.content == "xxxxxx"
    never = ask(client, max_tokens=6, logit_bias={str(x): 100}, extra={"bad_words": ["x"], "ignore_eos": True})
    assert "x" not in never.choices[0].message.content
    ends = {str(index): 100 for index in tokenizer.eos_ids}
    assert ask(client, max_tokens=20, logit_bias=ends, extra={"min_tokens": 9}).usage.completion_tokens == 10
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra": {"repetition_penalty": 50}}):
        bias = {str(index): 100 - 0.5 * place for place, index in enumerate(tokenizer.encode("xyz"))}
        penalised = ask(client, max_tokens=3, temperature=0, logit_bias=bias, **penalty)
        assert penalised.choices[0].message.content == "xyz" or "repetition" in str(penalty)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"guided_regex": "[z-a]"}, "regular expression cannot be held"),
        ({"guided_json": {"type": "string", "minLength": 3, "maxLength": 1}}, "Unsatisfiable"),
        ({"guided_json": "{"}, "JSON schema cannot be held"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "both ask for a form"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {"type": "json_schema"}}, "needs a 'json_schema'"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"tool_choice": "required"}, "there are no 'tools'"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}},
            "did you mean 'weather'",
        ),
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "'response_format'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        (
            {"tools": [{**WEATHER, "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "Unimplemented",
        ),
        ({"logit_bias": {"x": 1}}, "ids of this model's"),
        ({"logit_bias": {"999999": 1}}, "ids of this model's"),
        ({"min_tokens": 50, "max_tokens": 20}, "min_tokens"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "JSON object",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(url: str, fields: dict[str, Any], says: str) -> None:
    reply = httpx.post(url + "/chat/completions", json={"messages": ASKED, "max_tokens": 60, **fields}, timeout=60)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert says in error["message"]
    assert error["param"].partition(".")[0] in {*fields, "tool_choice"}


def test_a_schema_nested_too_deeply_harms_nobody(client: openai.OpenAI, url: str) -> None:
    deep = '{"a":' * 3000 + "1" + "}" * 3000
    body = '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "guided_json": ' + deep + "}"
    reply = httpx.post(url + "/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert ask(client, max_tokens=3).choices


CALLED = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "合肥", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)


def test_calls_that_a_model_makes_of_itself(tokenizer: Tokenizer) -> None:
    asked = {"model": "scripted", "messages": ASKED, "tools": [WEATHER, CLOCK]}
    with (
        scripted(tokenizer, "hm</think>" + CALLED) as (url, _),
        openai.OpenAI(base_url=url + "/v1", api_key="x") as some,
    ):
        whole = some.chat.completions.create(**asked).choices[0]
        assert (whole.message.content, whole.message.reasoning, whole.finish_reason) == ("I look.", "hm", "tool_calls")
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls]
        assert calls == [("weather", {"place": "合肥", "days": 2}), ("clock", {})]
        with some.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0]
        streamed = [(call.function.name, call.function.arguments) for call in final.message.tool_calls]
        assert streamed == [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
        for chunk in some.chat.completions.create(**asked, stream=True):
            places = [call.index for call in chunk.choices[0].delta.tool_calls or []]
            assert len(places) == len(set(places)), "clients expect one piece of a call in a chunk"
        one = some.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
        assert [call.function.name for call in one.message.tool_calls] == ["weather"]
        none = some.chat.completions.create(**asked, tool_choice="none").choices[0]
        assert none.message.tool_calls is None and none.message.content == CALLED and none.finish_reason == "stop"


def test_a_model_that_was_never_taught_tools_says_so(tokenizer: Tokenizer) -> None:
    settings = {**tokenizer._settings, "chat_template": "{{ messages[0].content }}"}
    untaught = Tokenizer(tokenizer._library.to_str(), settings, tokenizer.eos_ids)
    with scripted(untaught, "x") as (url, _):
        reply = httpx.post(url + "/v1/chat/completions", json={"messages": ASKED, "tools": [WEATHER]})
    assert reply.status_code == 400 and "says nothing of tools" in reply.json()["error"]["message"]
