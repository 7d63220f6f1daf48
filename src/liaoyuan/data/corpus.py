"""The corpus: text read, exact duplicates dropped, split by content, tokenised, in a folder that training maps.

Three stages, each a folder that is whole or absent, with the key of what it was made from: a killed preparation goes
on with the stage that was not finished, and a finished one is not made again from the same input.

    text/       documents.bin (all texts), documents.jsonl (one row each: split, hash, source, licence, begin, bytes)
    tokenizer/  tokenizer.json, tokenizer_config.json
    tokens/     train.bin, held_out.bin (ids), train_starts.npy, held_out_starts.npy (where documents begin)
    manifest.json, skipped.json
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.data.batches import TokenStream
from liaoyuan.data.reading import Skipped, Source, find_source, read_documents
from liaoyuan.data.tokenizer import Tokenizer, train_tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, atomic_folder, read_json, silent, sweep, write_json

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")
ENCODED_AT_ONCE = 2_000_000  # bytes handed to the library's threads together: enough for all cores, little memory


class CorpusConfig(Config):
    """What a corpus is made of.

    text: folder of `.txt .md .rst .py .jsonl .jsonl.zst` files; None is the Python standard library's sources.
    vocab_size: of the tokenizer trained on it; `tokenizer` names a folder with one to use instead.
    held_out_share: of the bytes; raised to `held_out_bytes` if that is at most a tenth of the text.
    """

    text: Path | None = None
    vocab_size: int = 4096
    tokenizer: Path | None = None
    tokenizer_sample_bytes: int = Field(4_000_000, gt=0)
    held_out_share: float = Field(0.05, ge=0, lt=1)
    held_out_bytes: int = Field(500_000, ge=0)
    max_document_bytes: int = Field(1_000_000, ge=4)  # a longer text becomes several documents; 4: one character
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus; `manifest` says what is in it, `fingerprint` changes when its tokens do."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_folder)

    def stream(self, split: Split = "train") -> TokenStream:
        """Return the tokens of a split, mapped from the file."""
        path = self.folder / "tokens" / f"{split}.bin"
        try:
            tokens = np.memmap(path, dtype=self.manifest["dtype"], mode="r")
            starts = np.load(path.with_name(f"{split}_starts.npy"))
        except (OSError, ValueError) as error:
            raise LiaoyuanError(f"The corpus file {path} is missing or torn: {error}.") from error
        if len(tokens) != self.manifest["tokens"][split] + 1:
            raise LiaoyuanError(f"The corpus file {path} is torn: run the data step again.")
        return TokenStream(tokens, starts)

    def documents(self, split: Split) -> list[dict[str, Any]]:
        """Return the rows of text/documents.jsonl for a split, in its order: hash, source, licence, begin, bytes."""
        return _documents(self.folder / "text", split)

    def held_out_bytes(self) -> bytes:
        """Return the held-out documents in UTF-8, one after another: what other compressors are given."""
        return b"".join(text.encode() for text in _texts(self.folder / "text", self.documents("held_out")))

    def held_out_documents(self) -> list[tuple[np.ndarray, int]]:
        """Return (ids int64 [n + 1], bytes) of each held-out document; the first id is the end-of-text token that
        stands before every document, the n that follow are to be predicted and encode all its bytes.
        """
        stream, rows = self.stream("held_out"), self.documents("held_out")
        ends = [*stream.starts[1:], len(stream.tokens) - 1]
        return [
            (stream.tokens[begin:end].astype(np.int64), row["bytes"])
            for begin, end, row in zip(stream.starts, ends, rows, strict=True)
        ]


def load_corpus(folder: Path) -> Corpus:
    """Open a corpus that `prepare_corpus` has finished; raises LiaoyuanError if there is none."""
    if not (folder / "manifest.json").exists():
        raise LiaoyuanError(f"{folder} is not a prepared corpus: it has no manifest.json. Run `liaoyuan data` first.")
    return Corpus(folder, read_json(folder / "manifest.json"))


def prepare_corpus(config: CorpusConfig, folder: Path, report: Report = silent) -> Corpus:
    """Make the corpus in `folder`, or go on with what a killed preparation has finished there.

    Its content depends on the texts and the config alone, not on the files' names or order.

    Raises:
        LiaoyuanError: no folder, no usable text, too little of it, a vocabulary too small, or the disk is full.
    """
    source = find_source(config.text)
    sweep(folder)
    rule = [config.seed, config.held_out_share, config.held_out_bytes, config.max_document_bytes]
    key = _key("text", str(source.folder.resolve()), source.fingerprint, *rule)
    _stage(folder / "text", key, lambda place: _read_text(config, source, place, report))
    key = content = read_json(folder / "text" / "summary.json")["content"]
    given = Tokenizer.load(config.tokenizer).hash if config.tokenizer else None
    key = _key("tokenizer", content, config.vocab_size, config.tokenizer_sample_bytes, given)
    _stage(folder / "tokenizer", key, lambda place: _make_tokenizer(config, folder / "text", place, report))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    fingerprint = _key("tokens", content, tokenizer.hash)
    _stage(folder / "tokens", fingerprint, lambda place: _tokenise(tokenizer, folder / "text", place, report))
    return Corpus(folder, _write_manifest(config, folder, source, tokenizer, fingerprint))


def _stage(folder: Path, key: str, make: Callable[[Path], None]) -> None:
    """Make the folder of a stage, unless it is there and was made from the same `key`."""
    stamp = folder / "stage.json"
    if stamp.exists() and read_json(stamp)["key"] == key:
        return
    with atomic_folder(folder) as place:
        make(place)
        write_json(place / "stage.json", {"key": key})


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_text(config: CorpusConfig, source: Source, place: Path, report: Report) -> None:
    """Read, drop exact duplicates, split: documents.bin, documents.jsonl, skipped.json and summary.json."""
    rows: dict[str, dict[str, Any]] = {}
    skipped, duplicates, begin = [], 0, 0
    progress = _Meter(report, source.bytes, "reading")
    with (place / "documents.bin").open("wb") as file:
        for done, item in read_documents(source, config.max_document_bytes):
            if isinstance(item, Skipped):
                skipped.append(vars(item))
            elif item.hash in rows:
                duplicates += 1
            else:
                size = file.write(item.text.encode())
                rows[item.hash] = {"source": item.source, "licence": item.licence, "begin": begin, "bytes": size}
                begin += size
            progress(done, f" ({begin / 1e6:.0f} MB of text)")
    progress(source.bytes)
    if not rows:
        raise LiaoyuanError(f"The folder {source.folder} has no usable text: {_reasons(skipped)}.")
    split = _split({name: row["bytes"] for name, row in rows.items()}, config)
    lines = [{"split": split[name], "hash": name, **rows[name]} for name in split]
    (place / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    content = _key(*split.items())
    write_json(place / "skipped.json", skipped)
    write_json(place / "summary.json", {"content": content, "duplicates": duplicates, "skipped": len(skipped)})


def _split(sizes: dict[str, int], config: CorpusConfig) -> dict[str, Split]:
    """Return the split of each document, in the order of salted content hashes; the first ones are held out."""
    if len(sizes) < 2:
        raise LiaoyuanError(
            "The text is a single document, so none can be held out: give more, or set a smaller max_document_bytes."
        )
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{config.seed} {name}".encode()).digest())
    total = sum(sizes.values())
    target = config.held_out_share * total
    if config.held_out_bytes * 10 <= total:
        target = max(target, config.held_out_bytes)
    split: dict[str, Split] = {}
    held_out = 0
    for name in order:
        split[name] = "held_out" if not split or (held_out < target and len(split) < len(order) - 1) else "train"
        held_out += sizes[name]
    return split


def _make_tokenizer(config: CorpusConfig, text: Path, place: Path, report: Report) -> None:
    if config.tokenizer:
        Tokenizer.load(config.tokenizer).save(place)
        return
    rows: list[dict[str, Any]] = []
    size = 0
    for row in _documents(text, "train"):
        if rows and size + row["bytes"] > config.tokenizer_sample_bytes:
            break
        rows.append(row)
        size += row["bytes"]
    meter = _Meter(report, size, "training the tokenizer")
    meter(0)
    train_tokenizer(_texts(text, rows), config.vocab_size).save(place)
    meter(size)


def _tokenise(tokenizer: Tokenizer, text: Path, place: Path, report: Report) -> None:
    """Write the ids of each split: every document after an end-of-text token, and one more at the end."""
    separator = tokenizer.end_of_text_id
    if separator is None:
        raise LiaoyuanError("The tokenizer has no token that ends a text (bos_token or eos_token).")
    dtype = token_dtype(tokenizer)
    meter = _Meter(report, (text / "documents.bin").stat().st_size, "tokenising")
    done = 0
    for split in SPLITS:
        starts, end = [], 0
        with (place / f"{split}.bin").open("wb") as file:
            for rows in _together(_documents(text, split)):
                for ids in tokenizer.encode_batch(list(_texts(text, rows))):
                    starts.append(end)
                    end += file.write(np.array([separator, *ids], dtype=dtype).tobytes()) // dtype.itemsize
                done += sum(row["bytes"] for row in rows)
                meter(done)
            file.write(np.array([separator], dtype=dtype).tobytes())
        np.save(place / f"{split}_starts.npy", np.array(starts, dtype=np.int64))


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return the smallest type that holds every id: uint16, or uint32 for more than 65,536 of them."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _together(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield documents in groups of about `ENCODED_AT_ONCE` bytes."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += row["bytes"]
        if size >= ENCODED_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _documents(text: Path, split: Split) -> list[dict[str, Any]]:
    lines = (text / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def _texts(text: Path, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    with (text / "documents.bin").open("rb") as file:
        for row in rows:
            file.seek(row["begin"])
            yield file.read(row["bytes"]).decode()


def _write_manifest(
    config: CorpusConfig, folder: Path, source: Source, tokenizer: Tokenizer, fingerprint: str
) -> dict[str, Any]:
    summary = read_json(folder / "text" / "summary.json")
    skipped = read_json(folder / "text" / "skipped.json")
    rows = {split: _documents(folder / "text", split) for split in SPLITS}
    dtype = token_dtype(tokenizer)
    size = {split: (folder / "tokens" / f"{split}.bin").stat().st_size // dtype.itemsize - 1 for split in SPLITS}
    manifest = {
        "source": {"name": source.name, "files": len(source.files), "licence": source.licence},
        "licences": dict(Counter(row["licence"] or "unknown" for part in rows.values() for row in part)),
        "documents": {split: len(rows[split]) for split in SPLITS},
        "bytes": {split: sum(row["bytes"] for row in rows[split]) for split in SPLITS},
        "tokens": size,
        "duplicates": summary["duplicates"],
        "skipped": len(skipped),
        "content": summary["content"],
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "fingerprint": fingerprint,
        "config": config.model_dump(mode="json"),
    }
    write_json(folder / "skipped.json", skipped)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _reasons(skipped: Sequence[dict[str, Any]]) -> str:
    """Return the three commonest reasons for skipping, in words."""
    counts: Counter[str] = Counter()
    for item in skipped:
        counts[item["reason"]] += item["count"]
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) or "it is empty"


class _Meter:
    """Reports bytes done as megabytes, at most once a second and once at the end."""

    def __init__(self, report: Report, total: int, text: str) -> None:
        self._report, self._total, self._text = report, total, text
        self._last = float("-inf")

    def __call__(self, done: int, more: str = "") -> None:
        now = time.monotonic()
        if now - self._last < 1.0 and done < self._total:
            return
        self._last = now
        self._report(Progress(done // 10**6, max(1, self._total // 10**6), "MB", self._text + more))
