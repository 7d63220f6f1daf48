"""A file of examples is tokenised once, whatever happens meanwhile, and gives what its records give one by one."""

import json
import multiprocessing
import multiprocessing.synchronize
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.data import (
    Message,
    Record,
    RecordTokens,
    TokenisedRecord,
    Tokenizer,
    record_cache,
    tokenise,
    tokenise_file,
    write_records,
)
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress


def talk(number: int) -> Record:
    asked = Message(role="user", content=f"{number} + {number} = ?")
    told = Message(role="assistant", content=f"{2 * number}", think="so" * (number % 3), weight=1 - number % 4 / 4)
    again = Message(role="assistant", content="是" * (number % 5 + 1))
    return Record(id=str(number), messages=(asked, told, asked, again))


RECORDS = [
    *(talk(number) for number in range(60)),
    Record(id="text", kind="text", messages=(Message(role="user", content="可以燎原" * 20),)),
    Record(
        id="forged", messages=(Message(role="user", content="<|end|>"), Message(role="assistant", content="<think>"))
    ),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_records(tmp_path / "records.jsonl.zst", RECORDS)
    return tmp_path / "records.jsonl.zst"


def same(found: RecordTokens, expected: list[TokenisedRecord]) -> bool:
    return found == RecordTokens.of(expected)


def test_the_file_gives_what_its_records_give(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = tokenise_file(path, tokenizer, cache=tmp_path / "cache")
    expected = tokenise(tokenizer, RECORDS)
    assert same(found.records, expected)
    assert found.records.tokens.dtype == np.uint16
    assert isinstance(found.records.tokens, np.memmap)
    for row, record in zip(found.records, expected, strict=True):
        assert row.tokens.tolist() == list(record.tokens)
        assert row.weights.tolist() == list(record.weights)
    learned = [sum(weight > 0 for weight in record.weights[1:]) for record in expected]
    assert found.records.learned().tolist() == learned
    assert found.records.total_weights() == pytest.approx([sum(record.weights[1:]) for record in expected])
    assert found.lines.tolist() == list(range(1, len(RECORDS) + 1))


def test_it_is_tokenised_once(
    path: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Progress] = []
    first = tokenise_file(path, tokenizer, report=reports.append, cache=tmp_path / "cache")
    assert reports[-1].done == reports[-1].total
    monkeypatch.setattr(record_cache, "_make", None)  # whoever tokenises again fails
    assert tokenise_file(path, tokenizer, cache=tmp_path / "cache").records == first.records


def test_another_file_template_or_tokenizer_is_another_entry(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = tokenise_file(path, tokenizer, cache=cache)
    definition = tokenizer._library.to_str()
    other_template = tokenizer.template_text.replace("<think>", "<think> ")
    others = [
        Tokenizer(definition, {"chat_template": other_template}),
        Tokenizer(definition.replace('"vocab"', ' "vocab"'), {"chat_template": tokenizer.template_text}),
    ]
    folders = {tokenise_file(path, other, cache=cache).folder for other in others} | {first.folder}
    write_records(path, RECORDS[1:])
    assert len(folders | {tokenise_file(path, tokenizer, cache=cache).folder}) == 4


@pytest.mark.parametrize("name", ["tokens.bin", "spans.npy", "manifest.json", "lines.npy"])
@pytest.mark.parametrize("how", ["cut", "turned", "gone"])
def test_a_torn_entry_is_found_and_made_again(
    path: Path, tokenizer: Tokenizer, tmp_path: Path, name: str, how: str
) -> None:
    first = tokenise_file(path, tokenizer, cache=tmp_path / "cache")
    expected = RecordTokens.of(list(first.records))
    file = first.folder / name
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        torn = data[:-3] if how == "cut" else data[:-3] + bytes(255 - byte for byte in data[-3:])
        file.unlink()
        file.write_bytes(torn)
    assert tokenise_file(path, tokenizer, cache=tmp_path / "cache").records == expected
    assert file.read_bytes() == data


def make(path: Path, folder: Path, cache: Path, barrier: multiprocessing.synchronize.Barrier, out: str) -> None:
    barrier.wait()
    found = tokenise_file(path, Tokenizer.load(folder), cache=cache)
    Path(out).write_text(json.dumps([len(found.records), int(found.records.tokens.sum())]))


def test_two_processes_may_start_at_once(path: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    outs = [str(tmp_path / f"{number}.json") for number in range(2)]
    processes = [
        context.Process(target=make, args=(path, tokenizer_folder, tmp_path / "cache", barrier, out)) for out in outs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    first, second = (json.loads(Path(out).read_text()) for out in outs)
    assert first == second
    assert first[0] == len(RECORDS)
    (entry,) = (tmp_path / "cache").iterdir()
    assert {item.name for item in entry.iterdir()} == {"tokens", ".lock"}


def test_a_stopped_process_leaves_nothing_that_looks_whole(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    usual, intervals = sys.getswitchinterval(), list[float]()

    def stop(progress: Progress) -> None:
        intervals.append(sys.getswitchinterval())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise_file(path, tokenizer, report=stop, cache=tmp_path / "cache")
    assert intervals[0] < usual == sys.getswitchinterval()  # Python's lock is handed over sooner meanwhile
    assert same(tokenise_file(path, tokenizer, cache=tmp_path / "cache").records, tokenise(tokenizer, RECORDS))


def test_bad_rows_are_skipped_only_if_the_user_agrees_and_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    good = json.dumps({"prompt": "q", "completion": "a"})
    asked = json.dumps({"id": "p", "kind": "prompt", "messages": [{"role": "user", "content": "q"}]})
    pair = json.dumps({"prompt": "q", "chosen": "g", "rejected": "b"})
    path.write_text("\n".join([good, "{", asked, pair, good]))
    with pytest.raises(LiaoyuanError, match=r"2 of 5 lines are bad: line 2: .*JSON.*line 3: .*a prompt"):
        tokenise_file(path, tokenizer, cache=tmp_path / "cache")
    found = tokenise_file(path, tokenizer, skip_bad=True, cache=tmp_path / "cache")
    assert found.lines.tolist() == [1, 5]
    assert (found.left_out, found.to_dict()["used"], found.to_dict()["bad_rows"]) == (3, 2, 3)
    with pytest.raises(LiaoyuanError, match="3 of 5"):  # nor is what is kept used without being asked for
        tokenise_file(path, tokenizer, cache=tmp_path / "cache")
    judged = tokenise_file(path, tokenizer, ("preference",), skip_bad=True, cache=tmp_path / "cache")
    assert judged.lines.tolist() == [4, 4]


def test_a_row_that_the_template_refuses_is_named_by_its_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = "{{ raise_exception('no systems') if messages[0].role == 'system' }}" + (tokenizer.template_text or "")
    other = Tokenizer(tokenizer._library.to_str(), {"chat_template": template})
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text("\n".join(json.dumps({"messages": rows}) for rows in (turns, [{"role": "system"}, *turns])))
    with pytest.raises(LiaoyuanError, match=r"line 2: expected a conversation .*no systems"):
        tokenise_file(path, other, cache=tmp_path / "cache")
    bare = Tokenizer(tokenizer._library.to_str(), {})
    with pytest.raises(LiaoyuanError, match="no chat template"):
        tokenise_file(path, bare, cache=tmp_path / "cache")


def test_what_is_too_long_is_refused_or_counted_and_texts_are_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    text = "0123456789" * 5
    rows = [{"prompt": "q", "completion": "a"}, {"text": text}, {"prompt": "q", "completion": "1 2 3 4 5 6 7 8 9 " * 9}]
    path.write_text("\n".join(map(json.dumps, rows)))
    whole = tokenise_file(path, tokenizer, cache=tmp_path / "cache")
    with pytest.raises(LiaoyuanError, match=r"1 of \d records do not fit in a sequence_length of 20; .*line 3"):
        whole.within(20, False)
    found = whole.within(20, True)
    assert (found.too_long, found.lines.tolist()) == (1, [1, 2, 2, 2])
    pieces = [record.tokens.tolist() for record in found.records][1:]
    assert [*pieces[0], *pieces[1][1:], *pieces[2][1:]] == whole.records[1].tokens.tolist()
    assert all(piece[0] == before[-1] for before, piece in pairwise(pieces))
    assert [record.weights.tolist() for record in found.records][1:] == [
        [0.0] + [1.0] * (len(piece) - 1) for piece in pieces
    ]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0, 0.25])), min_size=1), max_size=8
    )
)
def test_flat_arrays_hold_any_records(rows: list[list[tuple[int, float]]]) -> None:
    records = [TokenisedRecord(*map(list, zip(*row, strict=True))) for row in rows]
    flat = RecordTokens.of(records)
    assert len(flat) == len(records)
    for found, record in zip(flat, records, strict=True):
        assert found.tokens.tolist() == record.tokens
        assert found.weights.tolist() == record.weights
    kept = np.arange(len(records))[::-2]
    assert flat.select(kept) == RecordTokens.of([records[place] for place in kept])
    assert flat.total_weights() == pytest.approx([sum(record.weights[1:]) for record in records])
