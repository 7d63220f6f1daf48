"""Promises of the text layer: pieces put together are the whole, and no part of a stop string is ever shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.data.tokenizer import IncrementalDecoder, Tokenizer
from liaoyuan.inference import Event, ThinkMarks
from liaoyuan.serving.text import AnswerReader, Piece, StopFilter
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
