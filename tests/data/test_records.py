"""Records come back as they were written, and a wrong line is named."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.data import Message, Record, read_records, write_records
from liaoyuan.errors import LiaoyuanError

MESSAGES = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=st.text(), think=st.text())
RECORDS = st.builds(
    Record, id=st.text(), messages=st.lists(MESSAGES).map(tuple), answer=st.text(), level=st.integers(0)
)


@settings(max_examples=30, deadline=None)
@given(records=st.lists(RECORDS, min_size=1), suffix=st.sampled_from([".jsonl", ".jsonl.zst"]))
def test_records_come_back(tmp_path_factory: pytest.TempPathFactory, records: list[Record], suffix: str) -> None:
    path = tmp_path_factory.mktemp("records") / f"records{suffix}"
    write_records(path, records)
    assert read_records(path) == records


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "a"', "line 2"),
        ('{"id": "a", "kind": "song"}', "line 2: kind"),
        ('{"id": "a", "colour": 1}', "line 2: colour"),
        ('{"id": "a", "messages": [{"role": "moderator", "content": ""}]}', r"messages\.0\.role"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": "fine"}\n' + line)
    with pytest.raises(LiaoyuanError, match=reason):
        read_records(path)


def test_unreadable_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")
    for name, data, reason in (
        ("a.jsonl", b"\n", "no records"),
        ("b.jsonl", b"\xff\xfe", "not UTF-8"),
        ("c.jsonl.zst", b"torn", "decompressed"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LiaoyuanError, match=reason):
            read_records(tmp_path / name)
