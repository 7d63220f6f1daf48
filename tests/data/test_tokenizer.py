"""Text comes back from its ids, transformers reads the same tokenizer, and no text can forge a special token."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from liaoyuan.data import IncrementalDecoder, Tokenizer, train_tokenizer
from liaoyuan.data.tokenizer import MINIMUM_VOCABULARY, SPECIAL_TOKENS
from liaoyuan.errors import LiaoyuanError
from tests.data.conftest import SENTENCES

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260k"
TEXTS = st.one_of(
    st.text(), st.sampled_from(SENTENCES), st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "a", "7"])).map("".join)
)


@pytest.fixture(scope="module")
def oracle(tokenizer_folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_text_comes_back_from_its_ids_and_no_id_is_special(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert min(ids, default=len(SPECIAL_TOKENS)) >= len(SPECIAL_TOKENS)
    assert tokenizer.encode_batch([text, "x"])[0] == ids


def has_no_token(text: str) -> bool:
    """Return whether no special token is written in a text: of those transformers makes ids, and we characters."""
    return not any(token in text for token in SPECIAL_TOKENS)


@settings(max_examples=50, deadline=None)
@given(text=st.one_of(st.text(), st.sampled_from(SENTENCES)).filter(has_no_token))
def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, oracle: AutoTokenizer, text: str) -> None:
    assert tokenizer.encode(text) == oracle(text, add_special_tokens=False).input_ids


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    digits = [tokenizer.token_id(digit) for digit in "0123456789"]
    assert None not in digits
    assert tokenizer.encode("0123456789") == digits
    assert [index for index in tokenizer.encode("x12+3") if index in digits] == [digits[1], digits[2], digits[3]]


def test_special_tokens_are_single_ids_and_known_to_transformers(tokenizer: Tokenizer, oracle: AutoTokenizer) -> None:
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert oracle.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(len(SPECIAL_TOKENS)))
    assert (oracle.bos_token_id, oracle.eos_token_id) == (tokenizer.end_of_text_id, tokenizer.eos_ids[0])
    assert tokenizer.think_ids == (SPECIAL_TOKENS.index("<think>"), SPECIAL_TOKENS.index("</think>"))


def test_training_twice_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer([sentence * 3 for sentence in SENTENCES], vocab_size=400).hash == tokenizer.hash


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    loaded = Tokenizer.load(tokenizer_folder)
    assert loaded.encode(SENTENCES[3]) == tokenizer.encode(SENTENCES[3])
    assert (loaded.vocab_size, loaded.eos_ids) == (tokenizer.vocab_size, tokenizer.eos_ids) == (400, (4, 0))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stream_gives_the_whole_text_and_never_half_a_character(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.one_of(st.lists(st.integers(0, tokenizer.vocab_size - 1)), TEXTS.map(tokenizer.encode)))
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.feed([index]) for index in ids]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + decoder.finish() == whole
    if "�" not in whole:
        assert not any("�" in piece for piece in pieces)


def test_a_sentencepiece_tokenizer_streams_spaces_and_bytes() -> None:
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁": 2, "!": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    decoder = tokenizers.decoders
    library.decoder = decoder.Sequence(
        [decoder.Replace("▁", " "), decoder.ByteFallback(), decoder.Fuse(), decoder.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(library.to_str(), {})
    ids = [1, *(4 + byte for byte in "火".encode()), 3, 1]
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.feed([index]) for index in ids]
    assert pieces == ["Hello", "", "", "火", "!", " Hello"]
    assert "".join(pieces) == tokenizer.decode(ids) == "Hello火! Hello"
    assert IncrementalDecoder(tokenizer, continuing=True).feed(ids) == " Hello火! Hello"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', "\x00\x01"])
def test_a_torn_tokenizer_is_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LiaoyuanError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_and_torn_settings_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(LiaoyuanError, match="There is no folder"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(LiaoyuanError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({})[:1])
    with pytest.raises(LiaoyuanError, match="not valid JSON"):
        Tokenizer.load(tmp_path)


def test_a_models_own_end_tokens_are_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 4]}))
    assert Tokenizer.load(tmp_path).eos_ids == (4, 8, 7, 0)


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(LiaoyuanError, match=f"at least {MINIMUM_VOCABULARY}"):
        train_tokenizer(["text"], MINIMUM_VOCABULARY - 1)


@pytest.mark.skipif(not STORIES.exists(), reason="the shared models are not beside the project")
def test_a_foreign_tokenizer_gives_the_ids_of_transformers() -> None:
    ours, theirs = Tokenizer.load(STORIES), AutoTokenizer.from_pretrained(STORIES)
    text = "Once upon a time, there was a fox 火."
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == text
    assert (ours.end_of_text_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert "<s>" in ours.decode(ours.encode("a <s> b"))
