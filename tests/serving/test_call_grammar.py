"""Promises of the grammar of tool calls: what a random model draws under it is read back as right calls."""

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from liaoyuan.data.tokenizer import Tokenizer, train_tokenizer
from liaoyuan.inference.constraints.grammar import Grammars
from liaoyuan.serving.call_grammar import calls_grammar
from liaoyuan.serving.call_reader import CallReader
from liaoyuan.serving.chat_body import Function
from liaoyuan.serving.tools import FORMATS, Call, CallFormat, whole_calls

FORMS = {form.name: form for form in FORMATS}
SEARCH = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "maxLength": 5},
        "most": {"type": "integer", "minimum": 1, "maximum": 99},
        "kind": {"type": "string", "enum": ["web", "mail"]},
        "exact": {"type": "boolean"},
    },
    "required": ["most"],
    "additionalProperties": False,
}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = [
    Function(name="search", parameters=SEARCH, strict=True),
    Function(name="searching", parameters=SEARCH, strict=True),
    Function(name="now"),
]
SCHEMAS = {"search": SEARCH, "searching": SEARCH, "now": NONE}


def with_special_marks(form: CallFormat) -> Tokenizer:
    """Return a tokenizer that has the marks of a form as special tokens, as such models have."""
    own = train_tokenizer(['{"name": "search", "arguments": {"query": "x", "most": 12}} web mail'] * 9, 330)
    definition = json.loads(own._library.to_str())
    marks = [form.trigger, form.separator.strip(), form.end.split()[-1] if form.end else "", form.close]
    for mark in dict.fromkeys(mark for mark in marks if mark and not mark.startswith(("]", "`", ">"))):
        token = {**definition["added_tokens"][0], "id": len(definition["model"]["vocab"]), "content": mark}
        definition["added_tokens"].append(token)
        definition["model"]["vocab"][mark] = token["id"]
    return Tokenizer(json.dumps(definition), own._settings)


PLAIN = train_tokenizer(['{"name": "search", "arguments": {"query": "x", "most": 12}} web mail'] * 9, 330)


def allowed(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def drawn(tokenizer: Tokenizer, grammars: Grammars, grammar: Any, seed: int, forced: str = "") -> str | None:
    """Return what a random model says after the forced text; None if it does not end."""
    state, chance = grammars.compile(grammar).begin(()), np.random.default_rng(seed)
    ids = [index for piece in tokenizer._pieces(forced, []) for index in piece]
    for token in ids:
        assert token in allowed(state.mask())
        state.accept(token)
    for _ in range(1500):
        tokens = allowed(state.mask())
        ends = [token for token in tokens.tolist() if token in tokenizer.eos_ids]
        quote = [token for token in tokens.tolist() if tokenizer.token_bytes(token) in (b"<", b"\n")]
        token = ends[0] if ends else int(chance.choice(quote if quote and chance.random() < 0.3 else tokens))
        if ends:
            return b"".join(map(tokenizer.token_bytes, ids)).decode()
        state.accept(token)
        ids.append(token)
    return None


def called(form: CallFormat, text: str) -> tuple[str, list[Call]]:
    reader = CallReader(form, SCHEMAS)
    content, pieces = reader.feed(text)
    rest, more = reader.finish()
    return content + rest, whole_calls(pieces + more)


def check(form: CallFormat, calls: list[Call]) -> None:
    for call in calls:
        schema = SCHEMAS[call.name]
        if form.style == "tagged":  # whose texts have no bounds
            properties = {**SEARCH["properties"], "query": {"type": "string"}}
            schema = {**schema, "properties": properties if schema is SEARCH else {}}
        jsonschema.validate(json.loads(call.arguments), schema)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_drawn_is_read_back(name: str, special: bool) -> None:
    form = FORMS[name]
    tokenizer = with_special_marks(form) if special else PLAIN
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    found = 0
    for seed in range(5):
        text = drawn(tokenizer, grammars, calls_grammar(form, FUNCTIONS, grammars.vocabulary, most=2), seed)
        if text is not None:
            content, calls = called(form, text)
            assert content.strip() == "" and 1 <= len(calls) <= 2, text
            check(form, calls)
            found += 1
    grammars.close()
    assert found


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_text_is_free_until_a_call_begins(name: str, special: bool) -> None:
    form = FORMS[name]
    tokenizer = with_special_marks(form) if special else PLAIN
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    grammar = calls_grammar(form, FUNCTIONS, grammars.vocabulary, text=True)
    state = grammars.compile(grammar).begin(())
    for token in tokenizer.encode("Well, 1 < 2 {"):
        assert token in allowed(state.mask())
        state.accept(token)
    assert set(tokenizer.eos_ids) <= set(allowed(state.mask()))
    begin = ("I look. " + form.trigger) if form.trigger else '{"name": "'
    begun = grammars.compile(grammar).begin(())
    for piece in tokenizer._pieces(begin, []):
        for token in piece:
            assert token in allowed(begun.mask())
            begun.accept(token)
    assert not set(tokenizer.eos_ids) & set(allowed(begun.mask()))
    text = drawn(tokenizer, grammars, grammar, 1, begin)
    grammars.close()
    if text is not None:
        content, calls = called(form, text)
        assert calls and content.startswith("I look." if form.trigger else "")
        check(form, calls)


def test_an_answer_may_have_a_form_instead_of_calls() -> None:
    grammars = Grammars(PLAIN, PLAIN.vocab_size, PLAIN.eos_ids)
    answer = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    grammar = calls_grammar(FORMS["hermes"], FUNCTIONS, grammars.vocabulary, answer=answer)
    first = {PLAIN.token_bytes(token)[:1] for token in allowed(grammars.compile(grammar).begin(()).mask())}
    assert first == {b"{", b"<"}
    assert json.loads(drawn(PLAIN, grammars, grammar, 0, "{") or "") == {"a": 1}
    grammars.close()
