"""Reading text: the Python standard library's own sources, or a folder of text files, as documents with their history.

What cannot be used (binary, empty, not UTF-8, unreadable, not a known format) comes out as `Skipped`, with the reason.
"""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liaoyuan.data.records import read_lines
from liaoyuan.errors import LiaoyuanError

PLAIN = (".txt", ".md", ".rst", ".py")
LINES = (".jsonl", ".jsonl.zst")
# Not the library itself: its tests (a model should not be judged by them), and what others have installed beside it.
NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """A text with its history: the file (and line) it comes from, below the folder read, and its licence if known."""

    text: str
    source: str
    licence: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Skipped:
    """What was not read: a file, or `count` lines of it, and why."""

    source: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class Source:
    """The files to read, sorted by name: `folder`, what to call it, its licence, and (path, bytes) below it."""

    folder: Path
    name: str
    licence: str
    files: tuple[tuple[str, int], ...]
    fingerprint: str

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def find_source(folder: Path | None) -> Source:
    """List the files of `folder`, or of the Python standard library if it is None.

    Hidden folders are left out, links to folders are not followed. The fingerprint changes when a file changes.

    Raises:
        LiaoyuanError: there is no such folder, or no file in it.
    """
    library = folder is None
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    if not root.is_dir():
        raise LiaoyuanError(f"The text folder {root} does not exist.")
    use = (lambda path: path.endswith(".py")) if library else (lambda path: True)
    listed = sorted(_list(root, NOT_LIBRARY if library else frozenset(), use))
    if not listed:
        raise LiaoyuanError(f"The folder {root} has no files to read.")
    name, licence = ("Python standard library", "PSF-2.0") if library else (root.resolve().name, "")
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return Source(root, name, licence, tuple((path, size) for path, size, _ in listed), digest)


def read_documents(source: Source, max_bytes: int) -> Iterator[tuple[int, Document | Skipped]]:
    """Yield (bytes of the files done before, document or what was skipped), file by file.

    A text above `max_bytes` comes in pieces cut at line ends.
    """
    done = 0
    for path, size in source.files:
        if path.endswith(LINES):
            found = _read_lines(source, path)
        elif path.endswith(PLAIN):
            found = _read_plain(source, path)
        else:
            found = iter([Skipped(path, "not a known text format")])
        for item in found:
            for piece in _cut(item, max_bytes) if isinstance(item, Document) else [item]:
                yield done, piece
        done += size


def _list(root: Path, left_out: frozenset[str], use: Callable[[str], bool]) -> Iterator[tuple[str, int, int]]:
    """Yield (path below `root`, bytes, time of the last change) of each file."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for path in (Path(folder) / name for name in files if use(name)):
            try:
                status = path.stat()
            except OSError:
                continue  # gone since, or a link to nothing
            yield path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns


def _read_plain(source: Source, path: str) -> Iterator[Document | Skipped]:
    try:
        data = (source.folder / path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Skipped(path, "binary" if b"\0" in data else "not UTF-8")
    except OSError as error:
        yield Skipped(path, f"unreadable: {error.strerror}")
    else:
        reason = "binary" if "\0" in text else "empty" if not text.strip() else ""
        yield Skipped(path, reason) if reason else Document(text, path, source.licence)


def _read_lines(source: Source, path: str) -> Iterator[Document | Skipped]:
    skipped: Counter[str] = Counter()
    try:
        for number, line in read_lines(source.folder / path):
            text, licence, reason = _text_of_row(line)
            if text:
                yield Document(text, f"{path}:{number}", licence or source.licence)
            elif line.strip():
                skipped[reason] += 1
    except LiaoyuanError as error:
        skipped[str(error)] += 1
    yield from (Skipped(path, reason, count) for reason, count in skipped.items())


def _text_of_row(line: str) -> tuple[str, str, str]:
    """Return the text and licence of a line of JSON, or why it has no text."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return "", "", "lines that are not valid JSON"
    if not isinstance(row, dict):
        return "", "", "lines that are not JSON objects"
    text = row.get("text")
    text = text if isinstance(text, str) else _conversation(row.get("messages") or row.get("conversations"))
    if text is None:
        return "", "", "lines without a field 'text' or 'messages'"
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "", "", "lines with binary text"
    licence = row.get("licence") or row.get("license")
    return text.strip() and text, licence if isinstance(licence, str) else "", "lines with empty text"


def _conversation(messages: Any) -> str | None:
    """Return a conversation as text, "role: content" by paragraphs; None if it is none."""
    turns = []
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            content = message.get("content", message.get("value"))
            if isinstance(content, str):
                turns.append(f"{message.get('role', message.get('from', ''))}: {content}")
    return "\n\n".join(turns) if turns else None


def _cut(document: Document, max_bytes: int) -> Iterator[Document]:
    data = document.text.encode()
    if len(data) <= max_bytes:
        yield document
        return
    begin = 0
    while begin < len(data):
        end = _end_of_piece(data, begin, max_bytes)
        yield Document(data[begin:end].decode(), f"{document.source}#{begin}", document.licence)
        begin = end


def _end_of_piece(data: bytes, begin: int, max_bytes: int) -> int:
    """Return where the piece from `begin` ends: after the last line end within `max_bytes`, or between characters."""
    end = begin + max_bytes
    if end >= len(data):
        return len(data)
    line_end = data.rfind(b"\n", begin, end)
    if line_end >= begin:
        return line_end + 1
    while end > begin + 1 and data[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end
