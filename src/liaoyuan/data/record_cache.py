"""A file of examples, tokenised once: what was made is kept, mapped into memory, and found again by its content.

The key is a hash of the file, the tokenizer, the chat template, and the code that makes one from the other. An entry is
whole or absent; one that is torn is made again. While the library encodes on all cores, the next texts are rendered.
"""

import contextlib
import datetime
import hashlib
import json
import shutil
import sys
import time
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from liaoyuan.collector import without_collector
from liaoyuan.data.chat import Renderer
from liaoyuan.data.corpus import ENCODED_AT_ONCE, token_dtype
from liaoyuan.data.encoding import Encoded, Encoder, Rendered
from liaoyuan.data.fields import RowError
from liaoyuan.data.formats import Examples, Places, Tally, check_tally
from liaoyuan.data.record_tokens import Growing, RecordTokens, map_arrays, save_arrays
from liaoyuan.data.records import Kind, Record, conversations
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.build import cache_folder
from liaoyuan.rundir import Lock, Progress, Report, atomic_folder, read_json, silent, sweep, write_json

KINDS: tuple[Kind, ...] = ("chat", "text", "preference", "unpaired")  # what can be learned from
TURNS: frozenset[Kind] = frozenset(("chat", "text"))  # what supervised fine-tuning learns from
LEARNED_BY: dict[Kind, str] = {"chat": "sft", "text": "sft", "preference": "dpo", "unpaired": "dpo"}  # verbs of tune
PATIENCE = 24 * 3600.0  # seconds for which a process waits for another one that tokenises the same file
KILOBYTE = 1000
KEPT_SECONDS = 30 * 24 * 3600.0  # for which an entry is kept that nobody uses
ENCODED_FIRST = 50_000  # characters of the first group, each of the next twice as large up to `ENCODED_AT_ONCE`
AHEAD = 2  # groups that wait for the library while the next is rendered
HANDED_OVER = 0.0005  # seconds after which the library's thread gets Python's lock, which it needs between groups
DATED = ("strftime_now", "date_string", "datetime")  # a template that writes the day: another one tomorrow
ROWS = {"kinds": np.int8, "lines": np.int64, "labels": np.int8, "numbers": np.int64}  # known of each beside its tokens
CODES = {np.int8: "b", np.int64: "q"}  # of Python's arrays
Waiting = tuple[tuple[int, int, int, int], Rendered]  # `ROWS` of a record, and its text


@dataclass(frozen=True)
class TokenisedFile:
    """What was made of a file of examples.

    records: R, of a preference the better conversation, then the worse one. lines: int64 [R], where each comes from.
    kinds: int8 [R], places in `KINDS`. labels: int8 [R], 1 good, 0 bad, -1 not judged. numbers: int64 [R], which of the
    records that `Examples` gives of the file each is of. tally: what was in the file.
    folder: where it is kept. too_long: how many records are not here because they were.
    """

    records: RecordTokens
    kinds: np.ndarray
    lines: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray
    tally: Tally
    folder: Path
    too_long: int = 0

    def within(self, length: int, skip_long: bool) -> "TokenisedFile":
        """Return the records that fit in rows of `length` tokens; longer texts are cut into pieces.

        Raises:
            LiaoyuanError: some do not and `skip_long` is not set, or none does.
        """
        records, owner = self.records.cut(self.kinds == KINDS.index("text"), length)
        fits = records.sizes - 1 <= length
        longest = int(records.sizes.argmax())
        if not fits.all() and not (skip_long and fits.any()):
            advice = ", or use --skip-bad to leave them out" if fits.any() else ""
            raise LiaoyuanError(
                f"{int((~fits).sum()):,} of {len(fits):,} records do not fit in a sequence_length of {length}; the "
                f"longest (line {self.lines[owner[longest]]}) needs {records.sizes[longest] - 1:,}. Raise it{advice}."
            )
        kept = np.flatnonzero(fits)
        rows = {name: getattr(self, name)[owner[kept]] for name in ROWS}
        return replace(self, records=records.select(kept), **rows, too_long=int((~fits).sum()))

    @property
    def left_out(self) -> int:
        """How many rows and records are not learned from."""
        return self.tally.bad_rows + self.too_long

    def to_dict(self) -> dict[str, Any]:
        """Return what a run folder keeps of its data."""
        counts = {"used": len(self.records), "too_long": self.too_long, "bad_rows": self.tally.bad_rows}
        return {**counts, "file": self.tally.to_dict()}


def tokenise_file(
    path: Path,
    tokenizer: Tokenizer,
    kinds: Collection[Kind] = TURNS,
    skip_bad: bool = False,
    report: Report = silent,
    cache: Path | None = None,
) -> TokenisedFile:
    """Return the tokens of a file of examples in any known layout, from the cache if they were made before.

    Args:
        kinds: what is wanted; a record of another kind is a bad one.
        skip_bad: go on with the good rows if there are bad ones.
        cache: folder of the cache, if not the user's.

    Raises:
        LiaoyuanError: the file cannot be read, has nothing of use, or has bad rows and `skip_bad` is not set; the
            tokenizer has no chat template; the disk is full.
    """
    key = _key(path, tokenizer)
    root = cache or cache_folder() / "records"
    folder = root / key
    _forget(root)
    lock = Lock(folder, patience=PATIENCE)
    lock.take()
    try:
        found = _open(folder / "tokens")
        if found is None:
            sweep(folder)
            tally = _make(path, tokenizer, skip_bad, folder / "tokens", report)
            check_tally(path, tally, skip_bad)
            found = _open(folder / "tokens")
            if found is None:
                raise LiaoyuanError(f"{folder} cannot be read back. Delete it, and run again.")
    finally:
        lock.release()
    found = _only(found, kinds)
    check_tally(path, found.tally, skip_bad)
    return found


def _only(found: TokenisedFile, kinds: Collection[Kind]) -> TokenisedFile:
    """Return the records of these kinds; the lines of others are bad ones."""
    codes = [KINDS.index(kind) for kind in kinds]
    is_wanted = np.isin(found.kinds, codes)
    if is_wanted.all():
        return found
    kept, others = np.flatnonzero(is_wanted), np.unique(found.lines[~is_wanted])
    kind = KINDS[found.kinds[~is_wanted][0]]
    met = f"'{kind}', which tune {LEARNED_BY[kind]} learns from"
    bad = {f"a record of kind {' or '.join(sorted(kinds))}": Places(len(others), int(others[0]), met)}
    counts = Counter({kind: count for kind, count in found.tally.kinds.items() if kind in kinds})
    tally = replace(found.tally, bad=found.tally.bad | bad, kinds=counts, records=counts.total())
    rows = {name: getattr(found, name)[kept] for name in ROWS}
    return replace(found, records=found.records.select(kept), **rows, tally=tally)


def _make(path: Path, tokenizer: Tokenizer, skip_bad: bool, place: Path, report: Report) -> Tally:
    """Tokenise the file into the folder `place`; with bad rows that may not be skipped, count them and make nothing."""
    examples = Examples(path)
    with atomic_folder(place) as folder, without_collector(), _soon_handed_over():
        growing, rows = Growing(token_dtype(tokenizer)), {name: array(CODES[dtype]) for name, dtype in ROWS.items()}
        with (folder / "tokens.bin").open("wb") as file:
            for batch, encoded in _encoded(examples, tokenizer, skip_bad, report):
                file.write(growing.extend(encoded, _weights(batch)).tobytes())
                for values, column in zip(rows.values(), zip(*(row for row, _ in batch), strict=True), strict=True):
                    values.extend(column)
        tally = examples.tally
        if not tally.records or (tally.bad and not skip_bad):
            check_tally(path, tally, skip_bad)
        save_arrays(growing.whole(np.zeros(0, growing.dtype)), folder)
        for name, dtype in ROWS.items():
            np.save(folder / f"{name}.npy", np.frombuffer(rows[name], dtype))
        sums = {item.name: _sum(item) for item in sorted(folder.iterdir())}
        write_json(folder / "manifest.json", {"dtype": growing.dtype.name, "tally": tally.to_dict(), "sums": sums})
    return tally


def tokenise_in_memory(tokenizer: Tokenizer, records: Iterable[Record]) -> RecordTokens:
    """Return the tokens of records as `tokenise_file` makes them, without a file and without the cache.

    Raises:
        LiaoyuanError: nothing can be learned from a record, or the template does not show its answers.
    """
    renderer, growing = Renderer(tokenizer), Growing(token_dtype(tokenizer))
    rendered = (((0, 0, 0, 0), renderer(part)) for record in records for part in conversations(record))
    with without_collector(), _soon_handed_over():  # millions of ids come and go, none of them in a cycle
        kept = [growing.extend(encoded, _weights(batch)) for batch, encoded in _ahead(_grouped(rendered), tokenizer)]
    return growing.whole(np.concatenate(kept) if kept else np.zeros(0, growing.dtype))


def _encoded(
    examples: Examples, tokenizer: Tokenizer, skip_bad: bool, report: Report
) -> Iterator[tuple[list[Waiting], Encoded]]:
    """Yield what is rendered and its ids, batch by batch, and say how far the file is read."""
    total = max(1, examples.path.stat().st_size // KILOBYTE)
    for batch in _ahead(_batches(examples, tokenizer, skip_bad), tokenizer):
        yield batch
        done = min(examples.position // KILOBYTE, total)
        report(Progress(done, total, "kB", f"tokenising, {examples.tally.records:,} records"))
    report(Progress(total, total, "kB", f"tokenised, {examples.tally.records:,} records"))


def _ahead(batches: Iterable[list[Waiting]], tokenizer: Tokenizer) -> Iterator[tuple[list[Waiting], Encoded]]:
    """Yield each batch with its ids; others are rendered while the library encodes one on all cores."""
    encoder = Encoder(tokenizer)
    waiting: deque[tuple[list[Waiting], list[Rendered], Future[Any]]] = deque()

    def first() -> tuple[list[Waiting], Encoded]:
        batch, rendered, future = waiting.popleft()
        return batch, encoder.finish(rendered, future.result())

    with ThreadPoolExecutor(1) as library:
        for batch in batches:
            rendered = [one for _, one in batch]
            waiting.append((batch, rendered, library.submit(encoder.start, rendered)))
            if len(waiting) > AHEAD:
                yield first()
        while waiting:
            yield first()


@contextlib.contextmanager
def _soon_handed_over() -> Iterator[None]:
    """Let a thread that asks for Python's lock wait less: the library's idles meanwhile, and with it all cores."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(HANDED_OVER)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _weights(batch: Sequence[Waiting]) -> list[float]:
    return [weight for _, one in batch for weight in one.weights]


def _batches(examples: Examples, tokenizer: Tokenizer, skip_bad: bool) -> Iterator[list[Waiting]]:
    renderer = Renderer(tokenizer)
    return _grouped(_rendered(examples, renderer, skip_bad))


def _rendered(examples: Examples, renderer: Renderer, skip_bad: bool) -> Iterator[Waiting]:
    for number, record in enumerate(examples):
        try:
            rendered = _render(renderer, record)
        except RowError as error:
            examples.reject(record, error)
            continue
        if examples.tally.bad and not skip_bad:
            continue  # nothing will be made of the file: the bad rows are counted, so that all can be told at once
        label = -1 if record.label is None else int(record.label)
        row = (KINDS.index(record.kind), examples.line, label, number)
        yield from ((row, one) for one in rendered)


def _grouped(rendered: Iterable[Waiting]) -> Iterator[list[Waiting]]:
    """Yield conversations in groups, small ones first, so that the library soon has some; see `ENCODED_AT_ONCE`."""
    batch: list[Waiting] = []
    size, enough = 0, ENCODED_FIRST
    for row, one in rendered:
        batch.append((row, one))
        size += sum(map(len, one.texts))
        if size >= enough:
            yield batch
            batch, size, enough = [], 0, min(2 * enough, ENCODED_AT_ONCE)
    if batch:
        yield batch


def _render(renderer: Renderer, record: Record) -> list[Rendered]:
    if record.kind not in KINDS:
        raise RowError("an answer to learn from", "a prompt")
    if record.kind != "text" and not renderer.tokenizer.has_template:
        raise LiaoyuanError(
            "The model has no chat template, so it cannot be taught conversations: put one into its "
            "tokenizer_config.json or chat_template.jinja, or teach it texts."
        )
    try:
        return [renderer(part) for part in conversations(record)]
    except LiaoyuanError as error:
        raise RowError("a conversation that the model's chat template shows", str(error)) from error


def _open(folder: Path) -> TokenisedFile | None:
    """Return what is in a folder of the cache; None if it is missing or torn."""
    try:
        manifest = read_json(folder / "manifest.json")
        if any(_sum(folder / name) != found for name, found in manifest["sums"].items()):
            return None
        records = map_arrays(folder, folder / "tokens.bin", manifest["dtype"])
        rows = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ROWS}
        return TokenisedFile(records, **rows, tally=Tally.from_dict(manifest["tally"]), folder=folder)
    except (LiaoyuanError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _forget(root: Path) -> None:
    """Delete what nobody has used for a long time; the file of its lock is written at every use."""
    for lock in root.glob("*/.lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(lock.parent)


def _key(path: Path, tokenizer: Tokenizer) -> str:
    template = tokenizer.template_text or ""
    parts = [
        *(_code(), tokenizers.__version__, _digest(path), path.suffixes, path.name.split(".")[0]),
        *(tokenizer.hash, template, tokenizer.named_tokens, tokenizer.eos_ids),
    ]
    if any(name in template for name in DATED):
        parts.append(datetime.date.today().isoformat())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _code() -> str:
    """Return a hash of the code of this room: what a changed rule makes of a file has another key."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        raise LiaoyuanError(f"The file {path} does not exist.") from None
    except OSError as error:
        raise LiaoyuanError(f"The file {path} cannot be read: {error.strerror}.") from error


def _sum(path: Path) -> int:
    """Return the CRC-32 of a file: what a crash has torn is found, at the speed of reading."""
    total = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            total = zlib.crc32(piece, total)
    return total
