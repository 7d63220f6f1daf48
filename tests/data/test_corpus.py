"""A corpus is a function of its texts; killed at any stage and started again it is the same, bit for bit."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liaoyuan.data import Corpus, CorpusConfig, TokenBatches, Tokenizer, load_corpus, prepare_corpus
from liaoyuan.data import corpus as corpus_module
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import TEMPORARY


def config_of(text: Path, **values: Any) -> CorpusConfig:
    return CorpusConfig(text=text, vocab_size=400, **values)


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file that training reads."""
    names = [*folder.glob("tokens/*"), *folder.glob("tokenizer/*.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def test_the_held_out_tokens_encode_exactly_the_held_out_bytes(text_folder: Path, tmp_path: Path) -> None:
    corpus = prepare_corpus(config_of(text_folder), tmp_path / "corpus")
    tokenizer = corpus.tokenizer()
    documents = corpus.held_out_documents()
    texts = [tokenizer.decode(ids[1:].tolist(), skip_special=False).encode() for ids, _ in documents]
    assert b"".join(texts) == corpus.held_out_bytes()
    assert [len(text) for text in texts] == [size for _, size in documents]
    assert {int(ids[0]) for ids, _ in documents} == {tokenizer.end_of_text_id}


def test_every_document_is_in_exactly_one_split(text_folder: Path, tmp_path: Path) -> None:
    corpus = prepare_corpus(config_of(text_folder, held_out_share=0.3), tmp_path / "corpus")
    tokenizer = corpus.tokenizer()
    found: dict[str, list[str]] = {}
    for split in ("train", "held_out"):
        stream = corpus.stream(split)
        ends = [*stream.starts[1:].tolist(), len(stream.tokens) - 1]
        assert int(stream.tokens[-1]) == tokenizer.end_of_text_id
        pieces = zip(stream.starts.tolist(), ends, strict=True)
        found[split] = [tokenizer.decode(stream.tokens[begin + 1 : end].tolist(), False) for begin, end in pieces]
    texts = [path.read_bytes().decode() for path in text_folder.iterdir()]
    assert sorted(found["train"] + found["held_out"]) == sorted(texts)
    share = sum(len(text.encode()) for text in found["held_out"]) / sum(len(text.encode()) for text in texts)
    assert 0.25 < share < 0.4


def test_names_order_and_duplicates_change_nothing(text_folder: Path, tmp_path: Path) -> None:
    one = prepare_corpus(config_of(text_folder), tmp_path / "one")
    other = tmp_path / "renamed"
    (other / "deep").mkdir(parents=True)
    for place, path in enumerate(sorted(text_folder.iterdir(), reverse=True)):
        for copy in range(1 + place % 2):
            (other / "deep" / f"{place:03d}-{copy}.md").write_bytes(path.read_bytes())
    two = prepare_corpus(config_of(other), tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    assert (one.manifest["duplicates"], two.manifest["duplicates"]) == (0, 20)


def test_the_manifest_tells_what_is_in_it(text_folder: Path, tmp_path: Path) -> None:
    (text_folder / "empty.txt").write_text("")
    corpus = prepare_corpus(config_of(text_folder), tmp_path / "corpus")
    manifest = corpus.manifest
    assert sum(manifest["documents"].values()) == 40
    assert manifest["bytes"]["held_out"] == len(corpus.held_out_bytes())
    assert manifest["tokens"]["train"] == len(corpus.stream().tokens) - 1
    assert manifest["config"]["vocab_size"] == 400
    assert manifest["licences"] == {"unknown": 40}
    assert manifest["tokenizer"] == corpus.tokenizer().hash
    skipped = json.loads((tmp_path / "corpus" / "skipped.json").read_text())
    assert skipped == [{"source": "empty.txt", "reason": "empty", "count": 1}]
    row = corpus.documents("held_out")[0]
    text = (text_folder / row["source"]).read_bytes()
    assert row["hash"] == hashlib.sha256(text).hexdigest()
    assert load_corpus(tmp_path / "corpus").manifest == manifest


STAGES = ["_read_text", "_make_tokenizer", "_tokenise", "_write_manifest"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_a_stage_and_started_again_it_is_the_same(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    whole = prepare_corpus(config_of(text_folder), tmp_path / "whole")
    made: list[str] = []

    def killed(*arguments: Any) -> None:
        (tmp_path / "corpus" / f"{TEMPORARY}left-behind").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(config_of(text_folder), tmp_path / "corpus")
    with pytest.raises(LiaoyuanError, match="not a prepared corpus"):
        load_corpus(tmp_path / "corpus")
    for name in STAGES:
        monkeypatch.setattr(corpus_module, name, counted(getattr(corpus_module, name), name, made))
    resumed = prepare_corpus(config_of(text_folder), tmp_path / "corpus")
    assert made == STAGES[STAGES.index(stage) :]
    assert hashes(tmp_path / "corpus") == hashes(tmp_path / "whole")
    assert resumed.manifest == whole.manifest
    assert not list((tmp_path / "corpus").glob(f"{TEMPORARY}*"))


def counted(function: Any, name: str, made: list[str]) -> Any:
    def call(*arguments: Any) -> Any:
        made.append(name)
        return function(*arguments)

    return call


def test_only_what_depends_on_a_change_is_made_again(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for name in STAGES[:-1]:
        monkeypatch.setattr(corpus_module, name, counted(getattr(corpus_module, name), name, made))

    def stages_made(config: CorpusConfig) -> list[str]:
        made.clear()
        prepare_corpus(config, tmp_path / "corpus")
        return list(made)

    assert stages_made(config_of(text_folder)) == STAGES[:3]
    assert stages_made(config_of(text_folder)) == []
    os.utime(text_folder / "00.txt")
    assert stages_made(config_of(text_folder)) == ["_read_text"]
    assert stages_made(CorpusConfig(text=text_folder, vocab_size=300)) == ["_make_tokenizer", "_tokenise"]
    (text_folder / "new.txt").write_text("something new")
    assert stages_made(CorpusConfig(text=text_folder, vocab_size=300)) == STAGES[:3]


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        file = real_open(path, mode, *rest, **more)
        return Full(file) if path.name == "train.bin" and "w" in mode else file

    folder = tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(LiaoyuanError, match="The disk is full"):
            prepare_corpus(config_of(text_folder), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["text", "tokenizer"]
    prepare_corpus(config_of(text_folder), folder)
    assert load_corpus(folder).stream().starts[0] == 0


def test_torn_token_files_are_noticed(text_folder: Path, tmp_path: Path) -> None:
    corpus = prepare_corpus(config_of(text_folder), tmp_path / "corpus")
    path = corpus.folder / "tokens" / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(LiaoyuanError, match="torn"):
        corpus.stream()
    path.unlink()
    with pytest.raises(LiaoyuanError, match="missing"):
        corpus.stream()


def test_too_little_text_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for name, content, reason in (
        ("a.txt", "", "no usable text: 1 x empty"),
        ("a.txt", "one document", "single document"),
        ("a.png", "x", "not a known text format"),
    ):
        folder = tmp_path / reason[:6]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(LiaoyuanError, match=reason):
            prepare_corpus(config_of(folder), tmp_path / "corpus")
    with pytest.raises(LiaoyuanError, match="vocab_size"):
        folder = tmp_path / "two"
        folder.mkdir()
        for name in "ab":
            (folder / f"{name}.txt").write_text(f"document {name}")
        prepare_corpus(CorpusConfig(text=folder, vocab_size=10), tmp_path / "corpus")
    assert not (tmp_path / "corpus" / "manifest.json").exists()


@pytest.mark.parametrize(("total", "expected"), [(10_000_000, 500_000), (20_000_000, 1_000_000), (4_000_000, 200_000)])
def test_the_held_out_share_is_raised_to_its_minimum_where_the_text_allows(total: int, expected: int) -> None:
    sizes = {f"{number:04d}": total // 1000 for number in range(1000)}
    split = corpus_module._split(sizes, CorpusConfig())
    held_out = sum(sizes[name] for name, part in split.items() if part == "held_out")
    assert expected <= held_out <= expected + total // 1000


def test_an_existing_tokenizer_can_be_used(text_folder: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    config = CorpusConfig(text=text_folder, tokenizer=tokenizer_folder)
    corpus = prepare_corpus(config, tmp_path / "corpus")
    theirs = Tokenizer.load(tokenizer_folder)
    assert corpus.manifest["vocab_size"] == theirs.vocab_size
    ids = corpus.held_out_documents()[0][0][1:].tolist()
    assert ids == theirs.encode(theirs.decode(ids, skip_special=False))


def test_a_corpus_feeds_batches(text_folder: Path, tmp_path: Path) -> None:
    corpus: Corpus = prepare_corpus(config_of(text_folder), tmp_path / "corpus")
    batch = TokenBatches(corpus.stream(), 0, 128, 64)[3]
    assert int(batch.tokens.max()) < corpus.manifest["vocab_size"]
    assert corpus.stream().tokens.dtype == np.uint16
