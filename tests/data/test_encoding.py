"""The quick way of encoding gives the ids and the places that the library itself gives; what cannot be sure is not."""

import json
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.data import Message, Tokenizer, train_tokenizer
from liaoyuan.data.encoding import Encoder, Rendered, _one, byte_widths
from liaoyuan.data.records import plain_message

WORDS = "the cat sat on a mat é ü 你好世界 🙂 0123 <|end|> <think>  \n\n x=y"
TEXTS = st.lists(
    st.sampled_from(["the cat", " sat", "\n", "\n\n", " ", "你好", "世", "🙂", "é", "12", "<|end|>", "<think>"])
)
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
    assert byte_widths(composing) is not None
    loose = unicodedata.normalize("NFD", "é ü")
    rendered = [Rendered(["the cat", "<think>é"], [0.0, 1.0]), Rendered([f"<think>{loose}", "<|end|>é"], [0.0, 1.0])]
    found = Encoder(composing)(rendered)
    assert (found.ids.tolist(), found.ends.tolist()) == by_the_library(composing, rendered)
    assert found.sizes[1] == len(composing.encode_rendered("<think>é ü<|end|>é"))


@pytest.mark.parametrize(
    "values",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"end_of_word_suffix": "</w>"}},
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
    assert byte_widths(tokenizer) is not None and byte_widths(other) is None


def test_widths_are_the_bytes_of_each_token(tokenizer: Tokenizer) -> None:
    widths = byte_widths(tokenizer)
    assert widths is not None
    assert widths.tolist() == [len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)]
    assert widths.dtype == np.int64


def test_a_plain_message_is_the_message_that_is_made_in_the_ordinary_way() -> None:
    quick, whole = plain_message("user", "七"), Message(role="user", content="七")
    assert quick == whole and hash(quick) == hash(whole) and repr(quick) == repr(whole)
    assert quick.model_dump_json() == whole.model_dump_json()
    assert quick.model_dump(exclude_defaults=True) == {"role": "user", "content": "七"}
    assert quick.model_copy(update={"weight": 0.0}) == Message(role="user", content="七", weight=0.0)
    with pytest.raises(ValueError, match="frozen"):
        quick.content = "8"  # type: ignore[misc]
