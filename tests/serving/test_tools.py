"""Promises of tool calls: every form is read, however a stream is cut, and what comes out is always valid JSON."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from liaoyuan.data.tokenizer import Tokenizer, train_tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.serving.call_format import taught_format
from liaoyuan.serving.call_reader import CallReader
from liaoyuan.serving.json_text import JsonText
from liaoyuan.serving.tools import FORMATS, CallPiece, named_format, whole_calls

FORM = {form.name: form for form in FORMATS}
SEARCH = {
    "type": "object",
    "properties": {"query": {"type": "string"}, "most": {"type": "integer"}, "where": {"type": "object"}},
}
TOOLS: dict[str, dict[str, Any]] = {"search": SEARCH, "now": {}}

Outcome = tuple[str, list[tuple[str, str]]]


def read(name: str, cuts: list[str], most: int | None = None) -> tuple[str, list[CallPiece]]:
    reader, content, pieces = CallReader(FORM[name], TOOLS, most), "", list[CallPiece]()
    for text in cuts:
        said, called = reader.feed(text)
        content, pieces = content + said, [*pieces, *called]
    said, called = reader.finish()
    return content + said, [*pieces, *called]


def outcome(name: str, cuts: list[str], most: int | None = None) -> Outcome:
    content, pieces = read(name, cuts, most)
    calls = whole_calls(pieces)
    assert all(isinstance(json.loads(call.arguments), dict) and call.id for call in calls)
    return content, [(call.name, call.arguments) for call in calls]


# What models of each form write for: some words, then search(query="a \"b\"\n中", most=3), then now().
ARGUMENTS = '{"query": "a \\"b\\"\\n中", "most": 3}'
TAGS = {"query": 'a "b"\n中', "most": "3"}
WRITTEN = {
    "hermes": f'I look.\n<tool_call>\n{{"name": "search", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen-xml": "I look.\n<tool_call>\n<function=search>\n"
    + "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in TAGS.items())
    + "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm": "I look.\n<tool_call>search\n"
    + "".join(f"<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n" for name, value in TAGS.items())
    + "</tool_call>\n<tool_call>now\n</tool_call>",
    "mistral": f'I look.[TOOL_CALLS] [{{"name": "search", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}, '
    '{"name": "now", "arguments": {}}]',
    "mistral-args": f"I look.[TOOL_CALLS]search[CALL_ID]abcdefghi[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
    "deepseek-v3": "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n"
    + ARGUMENTS
    + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": f"I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{ARGUMENTS}"
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "list": f'I look.\n<tool_calls>[{{"name": "search", "arguments": {ARGUMENTS}}}, '
    '{"name": "now", "arguments": {}}]</tool_calls>',
    "llama": f'{{"name": "search", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
}


@pytest.mark.parametrize("name", FORM)
def test_each_form_is_read(name: str) -> None:
    content, calls = outcome(name, [WRITTEN[name]])
    assert content == ("" if name == "llama" else "I look.")
    assert [(called, json.loads(arguments)) for called, arguments in calls] == [
        ("search", {"query": 'a "b"\n中', "most": 3}),
        ("now", {}),
    ]


@pytest.mark.parametrize("name", FORM)
def test_arguments_are_streamed_piece_by_piece(name: str) -> None:
    _, pieces = read(name, list(WRITTEN[name]))
    assert [piece.name for piece in pieces if piece.name] == ["search", "now"]
    assert all(bool(piece.id) == bool(piece.name) for piece in pieces)
    assert len([piece for piece in pieces if piece.index == 0]) > 5


@pytest.mark.parametrize("name", FORM)
def test_one_call_is_enough_if_only_one_is_wanted(name: str) -> None:
    _, calls = outcome(name, [WRITTEN[name], " and more"], most=1)
    assert [called for called, _ in calls] == ["search"]


MARKS = sorted(
    {
        mark
        for form in FORMATS
        for mark in (
            form.open,
            form.start,
            form.separator,
            form.end,
            form.close,
            form.key_open,
            form.key_close,
            form.value_close,
        )
        if mark
    }
)
SCRAPS = [
    "search",
    "now",
    "unknown",
    '{"name": "search", "arguments": {',
    '"query": "x"',
    "}}",
    '"parameters"',
    "{",
    "}",
    "[",
    '"',
    "\\",
    "\\u12",
    ",",
    ":",
    "tru",
    "null",
    "-1",
    "\n",
    " ",
    "é🔥",
    "query",
    "[CALL_ID]",
]


@given(st.sampled_from(sorted(FORM)), st.data())
@settings(max_examples=600)
def test_every_cut_of_a_stream_gives_what_the_whole_gives(name: str, data: st.DataObject) -> None:
    """Of right texts, of texts that break off, and of rubbish made of marks."""
    text = data.draw(
        st.one_of(
            st.builds(lambda end: WRITTEN[name][:end], st.integers(0, len(WRITTEN[name]))),
            st.builds("".join, st.lists(st.sampled_from(MARKS + SCRAPS), max_size=14)),
            st.builds(
                lambda at, scrap: WRITTEN[name][:at] + scrap + WRITTEN[name][at:],
                st.integers(0, len(WRITTEN[name])),
                st.sampled_from(MARKS + SCRAPS),
            ),
        )
    )
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    cuts = [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]
    whole = outcome(name, [text])
    assert outcome(name, cuts) == whole
    assert outcome(name, list(text)) == whole


@pytest.mark.parametrize("name", FORM)
def test_what_breaks_off_anywhere_is_still_valid(name: str) -> None:
    for end in range(len(WRITTEN[name])):
        outcome(name, [WRITTEN[name][:end]])  # asserts that all arguments are objects


@pytest.mark.parametrize(
    "text",
    [
        "no call at all \n",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        "x < y <tool_call",
        "<tool_call> is a mark",
        '<tool_call>{"arguments": {}}</tool_call> \n',
        "<tool_call>" * 40,
    ],
)
def test_what_is_no_call_of_a_tool_stays_content(text: str) -> None:
    assert outcome("hermes", [text]) == (text, [])
    assert outcome("hermes", list(text)) == (text, [])


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "search"}', {}),
        ('{"name": "search", "arguments": null}', {}),
        ('{"name": "search", "arguments": "{\\"most\\": 1}"}', {"most": 1}),
        ('{"arguments": {"most": 1}, "name": "search"}', {"most": 1}),
        ('{"name": "search", "parameters": {"most": 1}}', {"most": 1}),
        ('{"name": "search", "arguments": {"query": "two\nlines\t"}}', {"query": "two\nlines\t"}),
        ('{"name": "search", "arguments": {"most": 1,}}', {"most": 1}),
        ('{"name": "search", "arguments": {\'most\': 1}}', {}),
        ('{"name": "search", "arguments": {"query": "a\\x"}}', {"query": "a"}),
    ],
)
def test_what_models_get_wrong_is_mended(written: str, arguments: dict[str, Any]) -> None:
    content, calls = outcome("hermes", list(f"<tool_call>{written}</tool_call>"))
    assert (content, [(name, json.loads(text)) for name, text in calls]) == ("", [("search", arguments)])


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@given(JSON, st.booleans(), st.sampled_from([None, 1]))
@example({"a": "\\"}, True, None)
def test_any_beginning_of_json_can_be_brought_to_an_end(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps([value], ensure_ascii=ascii_only, indent=indent)
    checked, shown = JsonText(), ""
    for character in text:
        shown += checked.feed(character)
        copy = JsonText()
        for each in shown:
            copy.feed(each)
        json.loads(shown + copy.close())
    assert checked.done and shown == text


@pytest.mark.parametrize(
    "text", ["[1 2]", "{1: 2}", "[01]", "[tru]", "[1}", '{"a" 1}', '["\\q"]', "[,]", '{"a": }', "[" * 200]
)
def test_what_is_no_json_is_refused(text: str) -> None:
    checked = JsonText()
    with pytest.raises(ValueError):
        for character in text:
            checked.feed(character)


WRITERS = {  # templates that write a call as models of each form do
    "hermes": '<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>',
    "qwen-xml": "<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    "glm": "<tool_call>{{ c.name }}{% for k, v in c.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>",
    "mistral": '[TOOL_CALLS][{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}, "id": "abcdefghi"}]',
    "mistral-args": "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}",
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.name }}\n```json\n"
    "{{ c.arguments | tojson }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>{{ c.arguments | tojson }}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama": '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}',
    "list": '<tool_calls>[{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}]</tool_calls>',
    None: "call {{ c.name }} with {{ c.arguments }}",
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_form_is_found_by_what_a_template_writes(name: str | None) -> None:
    own = train_tokenizer(["x"] * 3, 270)
    template = (
        "{% if tools %}Tools: {{ tools | tojson }} <tool_call>{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for t in m.tool_calls or [] %}{% set c = t.function %}" + WRITERS[name] + "{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    for each in (template, template.replace("<think>", "")):
        found = taught_format(Tokenizer(own._library.to_str(), {**own._settings, "chat_template": each}))
        assert name in (found.name if found else None, "llama" if "<think>" in each else name)


def test_our_own_template_writes_as_hermes_does_and_others_can_be_named() -> None:
    found = taught_format(train_tokenizer(["x"] * 3, 270))
    assert found and found.name == "hermes"
    assert named_format("glm") is FORM["glm"]
    with pytest.raises(LiaoyuanError, match="did you mean 'hermes'"):
        named_format("hermas")
