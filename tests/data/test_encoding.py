"""The quick way of encoding gives the ids and the places that the library itself gives; what cannot be sure is not."""

import copy
import json
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.data import Message, Record, Tokenizer, train_tokenizer
from liaoyuan.data.encoding import Encoder, Rendered, _one, byte_widths, keeps_bytes
from liaoyuan.data.opaque import GUARD
from liaoyuan.data.records import plain_chat, plain_message

WORDS = "the cat sat on a mat é ü 你好世界 🙂 0123 <|end|> <think>  \n\n x=y"
TEXTS = st.lists(
    st.sampled_from(["the cat", " sat", "\n", "\n\n", " ", "你好", "世", "🙂", "é", "12", "<|end|>", "<think>"])
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PIECES = st.lists(TEXTS.map("".join).filter(bool), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS] * 4, 320)


def changed(tokenizer: Tokenizer, **values: Any) -> Tokenizer:
    definition = json.loads(tokenizer._library.to_str())
    for name, value in values.items():
        definition[name] = definition[name] | value if isinstance(value, dict) and definition[name] else value
    return Tokenizer(json.dumps(definition), tokenizer._settings)


def by_the_library(tokenizer: Tokenizer, rendered: list[Rendered]) -> tuple[list[int], list[int]]:
    ids, ends = list[int](), list[int]()
    for one in rendered:
        its_ids, its_ends = _one(tokenizer, one, None)
        ids, ends = ids + its_ids, ends + its_ends
    return ids, ends


@given(st.lists(PIECES, max_size=6))
def test_ids_and_places_are_those_of_the_library(tokenizer: Tokenizer, conversations: list[list[str]]) -> None:
    rendered = [Rendered(pieces, [1.0] * len(pieces)) for pieces in conversations]
    found = Encoder(tokenizer)(rendered)
    assert (found.ids.tolist(), found.ends.tolist()) == by_the_library(tokenizer, rendered)
    assert found.pieces.tolist() == [len(pieces) for pieces in conversations]
    assert [sum(map(len, parts)) for parts in found.parts()] == found.sizes.tolist()


def test_the_quick_way_is_taken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "encode_rendered_batch", pytest.fail)
    found = Encoder(tokenizer)([Rendered(["<|user|>你好 🙂<|end|><think>", "</think>a cat<|end|>"], [0.0, 1.0])])
    assert len(found.ends) == 2


def test_texts_that_the_tokenizer_changes_are_encoded_in_the_ordinary_way(tokenizer: Tokenizer) -> None:
    composing = changed(tokenizer, normalizer={"type": "NFC"})
    assert keeps_bytes(composing)
    loose = unicodedata.normalize("NFD", "é ü")
    rendered = [Rendered(["the cat", "<think>é"], [0.0, 1.0]), Rendered([f"<think>{loose}", "<|end|>é"], [0.0, 1.0])]
    found = Encoder(composing)(rendered)
    assert (found.ids.tolist(), found.ends.tolist()) == by_the_library(composing, rendered)
    assert found.sizes[1] == len(composing.encode_rendered("<think>é ü<|end|>é"))


def test_a_text_whose_bytes_move_but_are_as_many_is_encoded_in_the_ordinary_way(tokenizer: Tokenizer) -> None:
    composing = changed(tokenizer, normalizer={"type": "NFC"})
    pieces = ["\u0958", "e\u0301" * 3]  # NFC makes 6 bytes of the first 3, and 6 of the next 9
    assert len(unicodedata.normalize("NFC", "".join(pieces)).encode()) == len("".join(pieces).encode())
    rendered = [Rendered(pieces, [0.0, 1.0])]
    found = Encoder(composing)(rendered)
    assert (found.ids.tolist(), found.ends.tolist()) == by_the_library(composing, rendered) and found.ends[0] == 6


def test_a_text_of_which_something_is_left_out_is_encoded_in_the_ordinary_way(tokenizer: Tokenizer) -> None:
    spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    definition = json.loads(tokenizer._library.to_str())
    definition["pre_tokenizer"]["pretokenizers"].insert(0, spaces)
    removing = Tokenizer(json.dumps(definition), tokenizer._settings)
    rendered = [Rendered(["<think>a", "<|end|>a c"], [0.0, 1.0]), Rendered(["x", "<think>x"], [0.0, 1.0])]
    found = Encoder(removing)(rendered)
    assert keeps_bytes(removing) and len(removing.encode("a c")) < len(tokenizer.encode("a c"))
    assert (found.ids.tolist(), found.ends.tolist()) == by_the_library(removing, rendered)


@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}])
def test_conversations_with_stand_ins_stand_among_others(tokenizer: Tokenizer, normalizer: dict[str, Any]) -> None:
    """With a tokenizer that is encoded quickly, and with one that is not."""
    other = changed(tokenizer, normalizer=normalizer)
    forged = Rendered([f"the {GUARD}0{GUARD} ", "<think>a cat"], [0.0, 1.0], ["<|end|>"])
    rendered = [forged, Rendered(["THE cat", " sat"], [0.0, 1.0]), forged, Rendered(["<think>on a", "mat"], [0.0, 1.0])]
    found, alone = Encoder(other)(rendered), [Encoder(other)([one]) for one in rendered]
    assert found.parts() == [part for one in alone for part in one.parts()]
    assert other.decode(found.parts()[0][0], skip_special=False) == "the <|end|> "
    assert other.token_id("<|end|>") not in found.parts()[0][0]  # it was written, so it is no token
    assert found.parts()[1] == [other.encode_rendered("THE cat"), other.encode_rendered(" sat")]
    assert forged.shown() == ["the <|end|> ", "<think>a cat"]


@pytest.mark.parametrize(
    "values",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTES]}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"model": {"continuing_subword_prefix": "##", "merges": []}},
        {"model": {"byte_fallback": True}},
    ],
)
def test_lengths_are_not_trusted_of_a_tokenizer_that_adds_to_a_text_or_changes_it(
    tokenizer: Tokenizer, values: dict[str, Any]
) -> None:
    if "pre_tokenizer" in values:
        definition = json.loads(tokenizer._library.to_str()) | values
        other = Tokenizer(json.dumps(definition), tokenizer._settings)
    else:
        other = changed(tokenizer, **values)
    assert keeps_bytes(tokenizer) and not keeps_bytes(other)


def test_lengths_are_not_trusted_where_a_byte_has_no_token_or_words_are_looked_up(tokenizer: Tokenizer) -> None:
    definition = json.loads(tokenizer._library.to_str())
    vocabulary = definition["model"]["vocab"]
    words = definition | {"model": {"type": "WordLevel", "vocab": {**vocabulary, "<unk>": 999}, "unk_token": "<unk>"}}
    del vocabulary[chr(256)]  # the byte 0
    for values in (definition, words):
        assert not keeps_bytes(Tokenizer(json.dumps(values), tokenizer._settings))


def test_widths_are_the_bytes_of_each_token(tokenizer: Tokenizer) -> None:
    definition = json.loads(tokenizer._library.to_str())
    more = {**definition["added_tokens"][0], "id": tokenizer.vocab_size, "content": "〈完〉"}
    other = Tokenizer(json.dumps(definition | {"added_tokens": [*definition["added_tokens"], more]}), {})
    widths = byte_widths(other)
    assert widths[-1] == 9
    assert widths.tolist() == [len(other.token_bytes(index)) for index in range(other.vocab_size)]
    assert widths.dtype == np.int64


def test_a_plain_message_is_the_message_that_is_made_in_the_ordinary_way() -> None:
    quick, whole = plain_message("user", "七"), Message(role="user", content="七")
    assert quick == whole and hash(quick) == hash(whole) and repr(quick) == repr(whole)
    assert quick.model_dump_json() == whole.model_dump_json()
    assert quick.model_dump(exclude_defaults=True) == {"role": "user", "content": "七"}
    assert quick.model_copy(update={"weight": 0.0}) == Message(role="user", content="七", weight=0.0)
    assert quick.model_copy(update={"think": "8"}).model_fields_set == {"role", "content", "think"}
    assert plain_message("user", "七").model_fields_set == whole.model_fields_set == {"role", "content"}
    chat, checked = plain_chat("1", (quick,)), Record(id="1", messages=(whole,))
    assert chat == checked and hash(chat) == hash(checked) and repr(chat) == repr(checked)
    assert chat.model_dump_json(exclude_defaults=True) == checked.model_dump_json(exclude_defaults=True)
    assert copy.deepcopy(chat) == chat == chat.model_copy(deep=True)
    with pytest.raises(ValueError, match="frozen"):
        quick.content = "8"  # type: ignore[misc]
