"""What a record costs in memory while a file is checked, and while a run is prepared: a few bytes, whatever it says."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.data import FileRecords, read_examples, train_tokenizer
from liaoyuan.data.checking import check, duplicates
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, silent
from liaoyuan.tuning.held_out import split
from liaoyuan.tuning.sft_data import read_source

FEW, MANY = 500, 4000
TEXT = "so it is said " * 20


def write(path: Path, count: int) -> Path:
    rows = ({"instruction": f"{n}: {TEXT}?", "output": f"{n + 1}: {TEXT}"} for n in range(count))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def bytes_a_record(work: Callable[[Path], Any], few: Path, many: Path) -> float:
    """Return by how much the peak of the memory grows with a record."""
    peaks = []
    work(few)
    for path in (few, many):
        tracemalloc.start()
        work(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (MANY - FEW)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "few.jsonl", FEW), write(tmp_path / "many.jsonl", MANY)


def test_checking_keeps_a_few_bytes_of_a_record(files: tuple[Path, Path]) -> None:
    assert bytes_a_record(check, *files) < 100


def test_preparing_a_run_keeps_a_few_bytes_of_a_record(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = train_tokenizer([TEXT], 300)
    for path in files:
        read_source(path, tokenizer, 4096, False, silent)  # tokenised: the cache is found below

    def prepare(path: Path) -> None:
        source = read_source(path, tokenizer, 4096, False, silent)
        parts = split(source.records, 0.1, 20)
        learned = source.tokens_of(parts.train)
        assert len(learned) == len(parts.train) == sum(1 for _ in parts.train) == len(source.records) - 20

    assert bytes_a_record(prepare, *files) < 600


def test_records_of_a_file_are_those_that_are_read_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", 6)
    whole, _ = read_examples(path)
    found = FileRecords(path, np.array([0, 2, 5]))
    assert [*found] == [whole[0], whole[2], whole[5]] and found[1] == whole[2] and [*found[1:]] == [whole[2], whole[5]]
    assert [*found.at(np.array([2]))] == [whole[5]] and [*found[:0]] == []
    write(path, 5)
    with pytest.raises(LiaoyuanError, match="has changed while it was read"):
        list(found)


def test_a_long_reading_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liaoyuan.data.file_records.TOLD_EVERY", 2)
    told = list[Progress]()
    found = FileRecords(write(tmp_path / "data.jsonl", 6), np.arange(6), told.append)
    list(found.at(np.array([0, 1, 3, 4, 5])))
    assert [(one.done, one.total) for one in told] == [(2, 5), (4, 5)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=20))
def test_duplicates_are_those_of_a_dictionary(rows: list[tuple[int, int]]) -> None:
    said = [text for text, _ in rows]
    lines = np.cumsum([step for _, step in rows], dtype=np.int64).tolist()
    seen, count, first = dict[int, int](), 0, None
    for text, line in zip(said, lines, strict=True):
        earlier = seen.setdefault(text, line)
        if earlier != line:
            count, first = count + 1, first or (line, earlier)
    assert duplicates(np.array(said, np.uint64), np.array(lines, np.int64)) == (count, first)
