"""Promises of the text layer: pieces put together are the whole, and no part of a stop string is ever shown."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.data.tokenizer import IncrementalDecoder, Tokenizer
from liaoyuan.inference import Event, ThinkMarks
from liaoyuan.serving.call_reader import CallReader
from liaoyuan.serving.text import AnswerReader, Piece, StopFilter
from liaoyuan.serving.tools import named_format, whole_calls
from tests.serving.conftest import chat_tokens


@given(
    st.lists(st.text("abcx", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_a_stop_filter_shows_what_precedes_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    passing, shown, text = StopFilter(tuple(stops)), "", ""
    for piece in pieces:
        text += piece
        shown += passing.feed(piece)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if passing.stopped:
            break
    found = [text.find(stop) for stop in stops if stop in text]
    assert passing.stopped == bool(found)
    if found:
        assert shown == text[: min(found)]
    else:
        assert shown + passing.flush() == text


def read_all(reader: AnswerReader, ids: list[int], group: int = 1) -> list[Piece]:
    pieces = []
    for start in range(0, len(ids), group):
        part = ids[start : start + group]
        last = start + group >= len(ids)
        pieces.append(reader.read(Event("x", part, [-1.0] * len(part), "stop" if last else None)))
        if pieces[-1].finish_reason:
            break
    return pieces


def reader(tokenizer: Tokenizer, stops: tuple[str, ...] = (), thinking: bool = False) -> AnswerReader:
    marks = ThinkMarks(*tokenizer.think_ids)
    return AnswerReader(lambda: IncrementalDecoder(tokenizer), stops, tokenizer.eos_ids, marks, thinking)


@pytest.mark.parametrize("group", [1, 3, 1000])
def test_thoughts_and_content_are_told_apart(tokenizer: Tokenizer, group: int) -> None:
    ids = chat_tokens(tokenizer, "先想一想 7 + 5</think>\n答案是 42 🔥")
    pieces = read_all(reader(tokenizer, thinking=True), ids, group)
    assert "".join(piece.reasoning for piece in pieces) == "先想一想 7 + 5"
    assert "".join(piece.content for piece in pieces) == "答案是 42 🔥"
    assert not any("�" in piece.content + piece.reasoning for piece in pieces)
    assert pieces[-1].completion_tokens == len(ids)
    assert pieces[-1].reasoning_tokens == ids.index(tokenizer.think_ids[1]) + 1


def test_a_thought_that_the_model_opens_itself(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.think_ids[0], *chat_tokens(tokenizer, "hm</think>42")]
    pieces = read_all(reader(tokenizer), ids)
    assert ("".join(p.reasoning for p in pieces), "".join(p.content for p in pieces)) == ("hm", "42")


def test_an_answer_cut_off_inside_its_thought_has_no_content(tokenizer: Tokenizer) -> None:
    piece = reader(tokenizer, thinking=True).read(Event("x", tokenizer.encode("7 + 5"), [-1.0] * 5, "length"))
    assert (piece.reasoning, piece.content, piece.finish_reason) == ("7 + 5", "", "length")


def test_a_cut_off_character_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🔥")
    assert len(ids) > 1
    piece = reader(tokenizer).read(Event("x", ids[:-1], [-1.0] * len(ids), "length"))
    assert piece.content == "�"


def test_stop_strings_are_looked_for_in_the_content_only(tokenizer: Tokenizer) -> None:
    ids = chat_tokens(tokenizer, "one. two.</think>The answer is 42. The end")
    pieces = read_all(reader(tokenizer, ("2. T",), thinking=True), ids)
    assert "".join(piece.reasoning for piece in pieces) == "one. two."
    assert "".join(piece.content for piece in pieces) == "The answer is 4"
    assert pieces[-1].finish_reason == "stop"


def test_scored_tokens_are_those_of_the_shown_content(tokenizer: Tokenizer) -> None:
    ids = chat_tokens(tokenizer, "hm</think>The answer is 42. The end")
    pieces = read_all(reader(tokenizer, ("2. T",), thinking=True), ids)
    scored = [token for piece in pieces for token in piece.tokens]
    assert tokenizer.decode([token.id for token in scored]) == "The answer is 4"
    text = ""
    for token in scored:
        assert token.start == len(text)
        text += tokenizer.decode([token.id])


def test_what_a_prompt_leaves_open(tokenizer: Tokenizer) -> None:
    marks = ThinkMarks(*tokenizer.think_ids)
    question = [{"role": "user", "content": "<think> is only text here"}]
    assert marks.left_open(tuple(tokenizer.render(question, thinking=True)))
    assert not marks.left_open(tuple(tokenizer.render(question, thinking=False)))
    assert not marks.left_open(tuple(tokenizer.encode("no marks")))


def calling_reader(tokenizer: Tokenizer, name: str = "hermes", most: int | None = None) -> AnswerReader:
    calls = CallReader(named_format(name), {"f": {}}, most)
    return AnswerReader(lambda: IncrementalDecoder(tokenizer), (), tokenizer.eos_ids, None, calls=calls)


def test_what_may_have_been_a_call_is_said_at_the_end(tokenizer: Tokenizer) -> None:
    for text in ("17 <tool_ca", '<tool_call>{"name": "g"', "17 \n"):
        pieces = read_all(calling_reader(tokenizer), chat_tokens(tokenizer, text))
        assert "".join(piece.content for piece in pieces) == text
        assert pieces[-1].finish_reason == "stop" and not any(piece.calls for piece in pieces)


@pytest.mark.parametrize("group", [1, 4, 1000])
def test_a_call_that_is_cut_off_has_valid_arguments_and_says_that_it_was_cut(tokenizer: Tokenizer, group: int) -> None:
    ids = tokenizer.encode('17 <tool_call>{"name": "f", "arguments": {"a": [1, "b')
    reading, calls, content = calling_reader(tokenizer), [], ""
    for start in range(0, len(ids), group):
        part = ids[start : start + group]
        piece = reading.read(Event("x", part, [-1.0] * len(part), "length" if start + group >= len(ids) else None))
        calls, content = [*calls, *piece.calls], content + piece.content
    assert (content, piece.finish_reason) == ("17", "length")
    assert [(call.name, json.loads(call.arguments)) for call in whole_calls(calls)] == [("f", {"a": [1, "b"]})]


def test_an_answer_ends_with_the_last_call_that_is_wanted(tokenizer: Tokenizer) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    pieces = read_all(calling_reader(tokenizer, most=1), chat_tokens(tokenizer, call * 3))
    assert pieces[-1].finish_reason == "tool_calls" and len(whole_calls(c for p in pieces for c in p.calls)) == 1
    assert pieces[-1].completion_tokens < len(tokenizer.encode(call * 3)) / 2


def test_marks_that_are_special_tokens_are_seen(tokenizer: Tokenizer) -> None:
    """As Mistral's are; the text of other special tokens is no part of an answer."""
    definition = json.loads(tokenizer._library.to_str())
    for mark in ("[TOOL_CALLS]", "[ARGS]"):
        index = len(definition["model"]["vocab"])
        definition["added_tokens"].append({**definition["added_tokens"][0], "id": index, "content": mark})
        definition["model"]["vocab"][mark] = index
    special = Tokenizer(json.dumps(definition), tokenizer._settings)
    marks = frozenset(index for index in special.special_ids if special.token_bytes(index).startswith(b"["))
    begin, between = special.token_id("[TOOL_CALLS]"), special.token_id("[ARGS]")
    ids = [begin, *special.encode("f"), between, *special.encode('{"a": 1}')]
    calls = CallReader(named_format("mistral-args"), {"f": {}})
    reading = AnswerReader(lambda: IncrementalDecoder(special, shown=marks), (), special.eos_ids, None, calls=calls)
    pieces = read_all(reading, [*ids, special.eos_ids[0]])
    assert [(c.name, c.arguments) for c in whole_calls(c for p in pieces for c in p.calls)] == [("f", '{"a": 1}')]
    assert "".join(piece.content for piece in pieces) == ""
