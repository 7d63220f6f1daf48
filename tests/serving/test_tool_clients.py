"""Oracle: tools with the clients of others: accumulators, parsers, tool runners of `anthropic`, `openai`, `litellm`."""

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from anthropic import beta_tool

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import Request
from liaoyuan.serving import build_app
from tests.serving.conftest import ScriptedRunner, chat_tokens, serving

CALLS = (
    'I add.</think>Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 25}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
ANSWER = "Done.</think>The answer is 42."
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
NOTHING = {"type": "object", "properties": {}}
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
THINKS = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
TOOLS = [
    {"name": "add", "description": "Adds.", "input_schema": SCHEMA},
    {"name": "now", "description": "The time.", "input_schema": NOTHING},
]
FUNCTIONS = [
    {"type": "function", "name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"]}
    for tool in TOOLS
]
CHAT_TOOLS = [{"type": "function", "function": {n: v for n, v in tool.items() if n != "type"}} for tool in FUNCTIONS]


@pytest.fixture(scope="module")
def said(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    """A server that calls two tools, and answers once it has been told what they gave."""

    def script(request: Request) -> list[int]:
        told = "<tool_response>" in tokenizer.decode(request.prompt, skip_special=False)
        return chat_tokens(tokenizer, ANSWER if told else CALLS)

    runner = ScriptedRunner(script)
    with serving(build_app(runner, tokenizer, "scripted", 8192)) as url:
        yield url, runner


@pytest.fixture(scope="module")
def claude(said: tuple[str, ScriptedRunner]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=said[0], api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def client(said: tuple[str, ScriptedRunner]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=said[0] + "/v1", api_key="none", max_retries=0) as made:
        yield made


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "max_tokens": 2000, "messages": QUESTION, "tools": TOOLS, **THINKS, **fields}


def without_ids(message: Any) -> dict[str, Any]:
    values = message.model_dump(exclude={"id", "created_at", "completed_at"})
    for block in values.get("content") or values["output"]:
        block.pop("id", None)
        block.pop("call_id", None)
    return values


def test_calls_are_blocks_of_a_message(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**asked())
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    add, now = message.content[2:]
    assert (add.name, add.input, now.name, now.input) == ("add", {"a": 17, "b": 25}, "now", {})
    assert message.stop_reason == "tool_use" and add.id != now.id
    with claude.messages.stream(**asked()) as stream:
        partial = [event.partial_json for event in stream if event.type == "input_json"]
        assert without_ids(stream.get_final_message()) == without_ids(message)
    assert len(partial) > 2 and json.loads("".join(partial).removesuffix("{}")) == add.input


def test_results_are_given_back(
    claude: anthropic.Anthropic, said: tuple[str, ScriptedRunner], tokenizer: Tokenizer
) -> None:
    first = claude.messages.create(**asked())
    calls = [block for block in first.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": [{"type": "text", "text": "42"}]},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": "no clock", "is_error": True},
    ]
    turns = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = claude.messages.create(**asked(messages=turns))
    assert second.content[-1].text == "The answer is 42." and second.stop_reason == "end_turn"
    called = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.input)}}
        for call in calls
    ]
    chat = [
        *QUESTION,
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "I add.", "tool_calls": called},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "42"},
        {"role": "tool", "tool_call_id": calls[1].id, "content": "Error: no clock"},
    ]
    assert said[1].requests[-1].prompt == tuple(tokenizer.render(chat, thinking=True, tools=CHAT_TOOLS))


def test_the_tool_runner_of_anthropics_client(claude: anthropic.Anthropic) -> None:
    added: list[int] = []

    @beta_tool
    def add(a: int, b: int) -> str:
        """Adds."""
        added.append(a + b)
        return str(a + b)

    @beta_tool
    def now() -> str:
        """The time."""
        return "noon"

    fields = {"model": "scripted", "max_tokens": 2000, "messages": QUESTION, "tools": [add, now], **THINKS}
    messages = list(claude.beta.messages.tool_runner(**fields))
    assert added == [42] and [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert messages[-1].content[-1].text == "The answer is 42."


def test_tools_count_as_tokens(claude: anthropic.Anthropic) -> None:
    plain = claude.messages.count_tokens(model="scripted", messages=QUESTION).input_tokens
    assert claude.messages.count_tokens(model="scripted", messages=QUESTION, tools=TOOLS).input_tokens > plain


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ({"type": "auto"}, 2),
        ({"type": "none"}, 0),
        ({"type": "auto", "disable_parallel_tool_use": True}, 1),
        ({"type": "any"}, 2),
        ({"type": "tool", "name": "add"}, 1),
    ],
)
def test_the_choice_of_tools(claude: anthropic.Anthropic, choice: dict, calls: int) -> None:
    message = claude.messages.create(**asked(tool_choice=choice))
    assert sum(block.type == "tool_use" for block in message.content) == calls


def test_a_call_that_is_cut_off_is_still_a_message(claude: anthropic.Anthropic, tokenizer: Tokenizer) -> None:
    whole = len(chat_tokens(tokenizer, CALLS))
    for most in range(whole - 40, whole):
        message = claude.messages.create(**asked(max_tokens=most))
        assert message.stop_reason == "max_tokens"
        assert all(isinstance(block.input, dict) for block in message.content if block.type == "tool_use")


def responses(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "input": "What is 17 + 25?", "tools": FUNCTIONS, **fields}


def test_calls_are_items_of_a_response(client: openai.OpenAI) -> None:
    response = client.responses.create(**responses())
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    add, now = response.output[2:]
    assert (add.name, json.loads(add.arguments), now.arguments) == ("add", {"a": 17, "b": 25}, "{}")
    assert response.status == "completed" and add.status == "completed"
    with client.responses.stream(**responses()) as stream:
        kinds = [event.type for event in stream]
        assert without_ids(stream.get_final_response())["output"][2]["arguments"] == add.arguments
    assert kinds.count("response.function_call_arguments.done") == 2
    assert kinds.count("response.function_call_arguments.delta") > 2


def test_outputs_are_given_back_in_full_or_after_the_response(
    client: openai.OpenAI, said: tuple[str, ScriptedRunner]
) -> None:
    first = client.responses.create(**responses())
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "42"}
        for item in first.output
        if item.type == "function_call"
    ]
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    full = client.responses.create(**responses(input=[*question, *first.output, *outputs]))
    after = client.responses.create(**responses(input=outputs, previous_response_id=first.id))
    assert full.output_text == after.output_text == "The answer is 42."
    assert said[1].requests[-1].prompt == said[1].requests[-2].prompt


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ("none", 0),
        ("required", 2),
        ({"type": "function", "name": "add"}, 1),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}, 1),
    ],
)
def test_the_choice_of_functions(client: openai.OpenAI, choice: Any, calls: int) -> None:
    response = client.responses.create(**responses(tool_choice=choice))
    assert sum(item.type == "function_call" for item in response.output) == calls
    single = client.responses.create(**responses(tool_choice=choice, parallel_tool_calls=False))
    assert sum(item.type == "function_call" for item in single.output) == min(calls, 1)


class Sum(pydantic.BaseModel):
    answer: int
    steps: list[str]


@pytest.fixture(scope="module")
def formed(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    """A server whose model has something to say in JSON."""
    runner = ScriptedRunner(lambda _: chat_tokens(tokenizer, 'hm</think>{"answer": 42, "steps": ["17 + 25"]}'))
    with serving(build_app(runner, tokenizer, "scripted", 8192)) as url:
        yield url, runner


def test_answers_are_parsed(formed: tuple[str, ScriptedRunner]) -> None:
    client = openai.OpenAI(base_url=formed[0] + "/v1", api_key="none", max_retries=0)
    expected = Sum(answer=42, steps=["17 + 25"])
    chat = client.chat.completions.parse(model="scripted", messages=QUESTION, response_format=Sum)
    assert chat.choices[0].message.parsed == expected
    response = client.responses.parse(model="scripted", input="What is 17 + 25?", text_format=Sum)
    assert response.output_parsed == expected
    with client.responses.stream(model="scripted", input="What is 17 + 25?", text_format=Sum) as stream:
        assert stream.get_final_response().output_parsed == expected
    claude = anthropic.Anthropic(base_url=formed[0], api_key="none", max_retries=0)
    message = claude.messages.parse(
        model="scripted", max_tokens=2000, messages=QUESTION, output_format=Sum, thinking={"type": "adaptive"}
    )
    assert message.parsed_output == expected
    assert all(request.sampling.constraint is not None for request in formed[1].requests)


def test_asynchronous_calls(said: tuple[str, ScriptedRunner]) -> None:
    async def names() -> list[list[str]]:
        claude = anthropic.AsyncAnthropic(base_url=said[0], api_key="none", max_retries=0)
        async with claude, claude.messages.stream(**asked()) as stream:
            blocks = (await stream.get_final_message()).content
        async with openai.AsyncOpenAI(base_url=said[0] + "/v1", api_key="none", max_retries=0) as client:
            items = (await client.responses.create(**responses())).output
            fields = {"model": "scripted", "messages": QUESTION, "tools": CHAT_TOOLS}
            async with client.chat.completions.stream(**fields) as stream:
                message = (await stream.get_final_completion()).choices[0].message
        return [
            [block.name for block in blocks if block.type == "tool_use"],
            [item.name for item in items if item.type == "function_call"],
            [call.function.name for call in message.tool_calls],
        ]

    assert asyncio.run(names()) == [["add", "now"]] * 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_through_litellm(said: tuple[str, ScriptedRunner], provider: str, stream: bool) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else the import asks the network for prices
    litellm = pytest.importorskip("litellm")
    reply = litellm.completion(
        model=f"{provider}/scripted",
        api_base=said[0] + ("/v1" if provider == "openai" else ""),
        api_key="none",
        messages=QUESTION,
        tools=CHAT_TOOLS,
        max_tokens=2000,
        stream=stream,
    )
    reply = litellm.stream_chunk_builder(list(reply)) if stream else reply
    calls = reply.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["add", "now"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": 17, "b": 25}, {}]
    assert reply.choices[0].finish_reason == "tool_calls"
