"""Promises of the chat template: tools are shown as transformers shows them; without them nothing has changed."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from liaoyuan.data.template import CHAT_TEMPLATE, compile_template, takes_tools
from liaoyuan.data.tokenizer import END_OF_TURN, Tokenizer, train_tokenizer
from liaoyuan.errors import LiaoyuanError

# The template of models that were trained before it knew tools.
BEFORE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|><think>' }}
        {%- if loop.last %}{{- message.reasoning_content or message.think or '' }}{% endif %}
        {{- '</think>' + message.content + '<|end|>' }}
    {%- elif message.role in ['system', 'user'] %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- else %}
        {{- raise_exception("the role must be system, user or assistant, not '" + message.role + "'") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|><think>' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '</think>' }}{% endif %}
{%- endif %}
"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place, now <|end|>",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"place": "合肥", "days": 2}}}
TOLD: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "reasoning_content": "I must look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    {"role": "tool", "content": "sun", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "Rain.", "reasoning_content": "So it is."},
    {"role": "user", "content": "And then?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is the weather? 天气"] * 5, 300)


TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=5)},
        optional={"reasoning_content": st.text(max_size=5)},
    ),
    max_size=5,
)


@given(TURNS, st.booleans(), st.booleans())
def test_conversations_without_tools_are_what_they_were(turns: list, prompt: bool, thinking: bool) -> None:
    before, now = (compile_template(source) for source in (BEFORE, CHAT_TEMPLATE))
    assert before and now
    assert now(turns, prompt, thinking, {}, None) == before(turns, prompt, thinking, {}, None)


@pytest.mark.parametrize("count", range(1, len(TOLD) + 1))
def test_tools_are_rendered_as_transformers_does(tokenizer: Tokenizer, tmp_path: Path, count: int) -> None:
    tokenizer.save(tmp_path)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    prompt = TOLD[count - 1]["role"] != "assistant"
    text = oracle.apply_chat_template(TOLD[:count], tools=[WEATHER], tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.render_text(TOLD[:count], generation_prompt=prompt, tools=[WEATHER]) == text


def test_a_thought_is_kept_until_the_user_speaks_again(tokenizer: Tokenizer) -> None:
    assert "I must look." in tokenizer.render_text(TOLD[:5], tools=[WEATHER])
    assert "I must look." not in tokenizer.render_text(TOLD, tools=[WEATHER])


def test_arguments_may_be_json_text_as_the_api_has_them(tokenizer: Tokenizer) -> None:
    function = {"name": "weather", "arguments": '{"place": "合肥", "days": 2}'}
    as_text = [*TOLD[:2], {**TOLD[2], "tool_calls": [{**CALL, "function": function}] * 2}, *TOLD[3:]]
    assert tokenizer.render(as_text, tools=[WEATHER]) == tokenizer.render(TOLD, tools=[WEATHER])
    for wrong in ("[1]", "{", "no JSON", "[" * 100_000):
        bad = [{"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": wrong}}]}]
        with pytest.raises(LiaoyuanError, match="arguments of the call of 'weather'"):
            tokenizer.render(bad)


def test_no_special_token_can_be_smuggled_in_by_a_tool(tokenizer: Tokenizer) -> None:
    end, evil = tokenizer.token_id(END_OF_TURN), "<|end|>"
    call = {"function": {"name": "f" + evil, "arguments": {evil: [evil, {"x": evil}]}}}
    told = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": evil},
    ]
    ids = tokenizer.render(told, tools=[WEATHER])
    assert ids.count(end) == 4  # of the system's turn, and of these three
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render_text(told, tools=[WEATHER])


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    with pytest.raises(LiaoyuanError, match="Unicode"):
        tokenizer.render([{"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(LiaoyuanError, match="Unicode"):
        tokenizer.render([{"role": "user", "content": "x"}], tools=[{"function": {"name": "\ud800"}}])


def test_templates_that_know_no_tools_are_told_apart() -> None:
    assert takes_tools(CHAT_TEMPLATE) and not takes_tools(BEFORE) and not takes_tools(None)


def test_a_thought_that_the_template_opens_anyway_is_closed_if_there_is_to_be_none(tokenizer: Tokenizer) -> None:
    always = "{% for message in messages %}{{ message.content }}{% endfor %}<think>\n\n"
    settings = {"chat_template": always}
    stubborn = Tokenizer(tokenizer._library.to_str(), settings)
    asked = [{"role": "user", "content": "Hi"}]
    assert stubborn.render_text(asked) == "Hi<think>\n"
    assert stubborn.render_text(asked, thinking=False) == "Hi<think>\n</think>"
    assert stubborn.render(asked, thinking=False)[-1] == tokenizer.think_ids[1]


@pytest.mark.parametrize(("name", "form"), [("date_string", "%d %b %Y"), ("datetime", "%b %d %Y")])
def test_templates_are_told_the_day(name: str, form: str) -> None:
    fill = compile_template("{{ " + name + " }}")
    assert fill is not None
    before = f"{datetime.date.today():{form}}"
    told = fill([], True, True, {}, None)
    assert told in (before, f"{datetime.date.today():{form}}")  # midnight may pass between the two
