"""Every usable text is read with its history, and whatever is not used is named with the reason."""

import json
import os
from pathlib import Path

import pytest
import zstandard

from liaoyuan.data.reading import Document, Skipped, find_source, read_documents
from liaoyuan.errors import LiaoyuanError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def read(folder: Path | None, max_bytes: int = 10**6) -> tuple[dict[str, Document], dict[str, Skipped]]:
    items = [item for _, item in read_documents(find_source(folder), max_bytes)]
    documents = {item.source: item for item in items if isinstance(item, Document)}
    return documents, {item.source: item for item in items if isinstance(item, Skipped)}


def test_all_formats_are_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b.md", "c.rst", "deep/d.py"):
        (tmp_path / name).write_text(f"text of {name} 火\r\n", encoding="utf-8", newline="")
    rows = [
        {"text": "first", "licence": "CC0-1.0"},
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "e.jsonl").write_text(lines)
    half = len(lines) // 2  # two frames, as appended files have
    packed = zstandard.compress(lines[:half].encode()) + zstandard.compress(lines[half:].encode())
    (tmp_path / "f.jsonl.zst").write_bytes(packed)
    documents, skipped = read(tmp_path)
    assert not skipped
    assert documents["deep/d.py"].text == "text of deep/d.py 火\r\n"
    for name in ("e.jsonl", "f.jsonl.zst"):
        assert documents[f"{name}:1"] == Document("first", f"{name}:1", "CC0-1.0")
        assert documents[f"{name}:2"].text == "user: 2+2?\n\nassistant: 4"
        assert documents[f"{name}:3"].text == "human: hi"
    assert len(documents) == 10


def test_what_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0\xff\xfe")
    (tmp_path / "nul.txt").write_bytes(b"text\0text")
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "torn.jsonl.zst").write_bytes(b"no zstd")
    lines = ['{"text": "fine"}', '{"text": "to', "[1]", '{"other": 1}', '{"text": ""}', '{"text": "\\ud800"}', "", "3"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    items = [item for _, item in read_documents(find_source(tmp_path), 10**6)]
    assert [item.text for item in items if isinstance(item, Document)] == ["good", "fine"]
    reasons = {(item.source, item.reason): item.count for item in items if isinstance(item, Skipped)}
    assert reasons.pop(("torn.jsonl.zst", next(reason for name, reason in reasons if name == "torn.jsonl.zst"))) == 1
    assert reasons == {
        ("binary.txt", "binary"): 1,
        ("nul.txt", "binary"): 1,
        ("empty.md", "empty"): 1,
        ("latin.txt", "not UTF-8"): 1,
        ("picture.png", "not a known text format"): 1,
        ("rows.jsonl", "lines that are not valid JSON"): 1,
        ("rows.jsonl", "lines that are not JSON objects"): 2,
        ("rows.jsonl", "lines without a field 'text' or 'messages'"): 1,
        ("rows.jsonl", "lines with empty text"): 1,
        ("rows.jsonl", "lines with binary text"): 1,
    }


@pytest.mark.parametrize("max_bytes", [4, 7, 100])
def test_a_long_text_is_cut_into_whole_characters_and_lines(tmp_path: Path, max_bytes: int) -> None:
    text = "".join(f"line {number} 火\n" for number in range(50)) + "火" * 50
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    pieces = [document.text for document in read(tmp_path, max_bytes)[0].values()]
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= max_bytes
    if max_bytes == 100:
        assert all(piece.endswith("\n") for piece in pieces[:5])


def test_the_standard_library_is_read_without_its_tests() -> None:
    source = find_source(None)
    names = [name for name, _ in source.files]
    assert "json/decoder.py" in names
    assert source.bytes > 5_000_000
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert source.licence == "PSF-2.0"


def test_a_changed_file_changes_the_fingerprint(text_folder: Path) -> None:
    before = find_source(text_folder).fingerprint
    assert find_source(text_folder).fingerprint == before
    os.utime(text_folder / "00.txt", ns=(1, 1))
    assert find_source(text_folder).fingerprint != before


def test_hidden_folders_and_broken_links_are_left_out(text_folder: Path) -> None:
    (text_folder / ".git").mkdir()
    (text_folder / ".git" / "log.txt").write_text("secret")
    (text_folder / "gone.txt").symlink_to(text_folder / "nowhere")
    (text_folder / "loop").symlink_to(text_folder)
    assert len(find_source(text_folder).files) == 40


def test_a_missing_or_empty_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="does not exist"):
        find_source(tmp_path / "none")
    with pytest.raises(LiaoyuanError, match="no files"):
        find_source(tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not beside the project")
def test_real_compressed_documents_are_read() -> None:
    documents, skipped = read(SHARED / "pretrain" / "code")
    assert len(documents) > 100
    assert not skipped
