"""Files in the layouts that people have become records; what is dropped is counted, and named by its line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from liaoyuan.data import Examples, Message, Record, read_examples, read_records
from liaoyuan.data.converting import convert_file
from liaoyuan.data.fields import RowError, turn, turns
from liaoyuan.data.formats import convert, flaw_of, read_rows
from liaoyuan.errors import LiaoyuanError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
CALL = {"name": "weather", "arguments": {"place": "合肥"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def one(row: dict[str, Any]) -> Record:
    _, (record,), _ = convert(row, "file-1")
    assert flaw_of(record) is None
    return record


def talk(record: Record) -> list[tuple[str, str, str]]:
    return [(message.role, message.think, message.content) for message in record.messages]


QUESTION = [("user", "", "q"), ("assistant", "", "a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "output": "a"}, QUESTION),
        ({"instruction": "q", "input": "", "output": "a"}, QUESTION),
        ({"instruction": "q", "input": "i", "output": "a"}, [("user", "", "q\n\ni"), ("assistant", "", "a")]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]},
            [("system", "", "s"), ("user", "", "q0"), ("assistant", "", "a0"), *QUESTION],
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QUESTION),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("system", "", "s"), *QUESTION],
        ),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, QUESTION),
        (
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a", "reasoning_content": "t"},
                ]
            },
            [("system", "", "s"), ("user", "", "q"), ("assistant", "t", "a")],
        ),
        ({"prompt": "q", "completion": "a"}, QUESTION),
        ({"prompt": "q", "response": "<think>\nt\n</think>\n\na"}, [("user", "", "q"), ("assistant", "t", "a")]),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            QUESTION,
        ),
        ({"query": "q", "response": "a"}, QUESTION),
        ({"question": "q", "answer": "a"}, QUESTION),
        ({"question": "q", "answer": "<think>\nt\n</think>\n\na"}, [("user", "", "q"), ("assistant", "t", "a")]),
        ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, QUESTION),
        ({"text": "whole"}, [("user", "", "whole")]),
    ],
)
def test_a_row_is_recognised_by_its_fields(row: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    assert talk(one(row)) == expected


USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "g", "rejected": "b"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "g"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"instruction": "q", "input": "", "chosen": "g", "rejected": "b"},
        {"question": "q", "chosen": "g", "rejected": "b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: g", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
)
def test_preferences_come_in_all_shapes(row: dict[str, Any]) -> None:
    record = one(row)
    assert record.kind == "preference"
    assert talk(record) == [("user", "", "q")]
    assert [message.content for message in (*record.chosen, *record.rejected)] == ["g", "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": False},
        {"messages": [USER, {"role": "assistant", "content": "a"}], "label": False},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
        {"instruction": "q", "output": "a", "kto_tag": False},
        {"question": "q", "answer": "a", "label": False},
        {"question": "q", "answer": "a", "kto_tag": False},
    ],
)
def test_an_answer_with_a_label_is_unpaired(row: dict[str, Any]) -> None:
    record = one(row)
    assert (record.kind, record.label, talk(record)) == ("unpaired", False, QUESTION)


@pytest.mark.parametrize(
    "row",
    [
        {
            "tools": json.dumps([TOOL["function"]]),
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "I look."},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "Rain."},
            ],
        },
        {
            "tools": [TOOL],
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": "I look.",
                    "tool_calls": [
                        {"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
                    ],
                },
                {"role": "tool", "content": "rain"},
                {"role": "assistant", "content": "Rain."},
            ],
        },
    ],
)
def test_calls_of_tools_are_calls_and_not_text(row: dict[str, Any]) -> None:
    record = one(row)
    assert record.tools == (TOOL,)
    assert [message.role for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = record.messages[1].tool_calls
    assert (record.messages[1].content, call.name, call.arguments) == ("I look.", "weather", {"place": "合肥"})


TURNS = [
    {"role": "user", "content": "q"},
    {"from": "gpt", "value": "a"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"role": "assistant", "content": "<think>t</think>a"},
    {"role": "Human", "content": "q"},
    {"role": "user", "content": None},
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "a", "weight": 0.5},
    {"role": "assistant", "reasoning": "t"},
]


@pytest.mark.parametrize("item", TURNS)
def test_the_short_way_of_a_turn_gives_what_the_whole_way_does(item: dict[str, Any]) -> None:
    assert turns([item], "messages") == [turn(item, "messages")]


def test_a_plain_turn_is_not_checked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liaoyuan.data.fields.turn", None)
    assert turns(TURNS[:2], "messages") == [
        Message(role="user", content="q"),
        Message(role="assistant", content="a"),
    ]


@pytest.mark.parametrize("item", [{"role": ["user"], "content": "q"}, {"role": 1, "content": "q"}, "user", {}])
def test_a_turn_without_a_role_is_refused(item: Any) -> None:
    with pytest.raises(RowError, match=r"a role of user|turns with a role"):
        turns([item], "messages")


@pytest.mark.parametrize("told", ["id", "qid", "level", "difficulty", "source", "licence", "license", "split"])
def test_the_history_of_a_conversation_is_kept(told: str) -> None:
    talked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    plain, record = one({"messages": talked}), one({"messages": talked, told: "7"})
    assert plain == Record(id="file-1", messages=plain.messages)
    name = {"qid": "id", "difficulty": "level", "license": "licence"}.get(told, told)
    assert record == plain.model_copy(update={name: 7 if name == "level" else "7"})


@pytest.mark.parametrize(
    ("told", "changed"),
    [
        ({"system": "s"}, {"messages": 3}),
        ({"system_prompt": "s"}, {"messages": 3}),
        ({"tools": [TOOL]}, {"tools": (TOOL,)}),
        ({"functions": [TOOL["function"]]}, {"tools": (TOOL,)}),
        ({"task": "t"}, {"task": "t"}),
        ({"answer": "a"}, {"answer": "a"}),
        ({"label": False}, {"kind": "unpaired", "label": False}),
        ({"kto_tag": True}, {"kind": "unpaired", "label": True}),
    ],
)
def test_what_stands_beside_the_turns_counts(told: dict[str, Any], changed: dict[str, Any]) -> None:
    record = one({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], **told})
    found = {name: getattr(record, name) for name in changed}
    assert found | ({"messages": len(record.messages)} if "messages" in changed else {}) == changed


def test_empty_lines_and_marks_are_passed_over_and_bytes_that_are_no_text_refused(tmp_path: Path) -> None:
    path, row = tmp_path / "rows.jsonl", json.dumps({"text": "七"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\n\n \t\n" + "\u3000\n".encode() + row + b"\r\n" + row)
    places: list[int] = []
    assert [line for line, _ in read_rows(path, places.append)] == [1, 5, 6]
    assert places[-1] == path.stat().st_size and places == sorted(places)
    assert [record.messages[0].content for record in Examples(path)] == ["七"] * 3
    path.write_bytes(row + b'\n{"text": "\xff"}\n')
    with pytest.raises(LiaoyuanError, match="is not UTF-8 text"):
        read_examples(path, skip_bad=True)
    path.write_bytes(row + b"\n  {\n")
    assert [place.found[:5] for place in read_examples(path, skip_bad=True)[1].bad.values()] == ["'{' ("]


def test_a_turn_may_have_a_weight_of_its_own() -> None:
    rows = [USER, {**GOOD, "weight": 0}, USER, {**GOOD, "train": False}, USER, {**GOOD, "weight": 0.5}]
    assert [message.weight for message in one({"messages": rows}).messages[1::2]] == [0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("row", "expected", "found"),
    [
        ('{"messages": [', "JSON", "EOF"),
        ("[1]", "a JSON object", "[1]"),
        ('{"mesages": []}', "the fields of a known layout", "did you mean 'messages'"),
        ('{"messages": []}', "a list of turns in 'messages'", "[]"),
        (
            '{"messages": [{"role": "narrator", "content": "x"}]}',
            "a role of user, assistant, system or tool",
            "narrator",
        ),
        ('{"messages": [{"role": "user", "content": 3}]}', "text in 'messages'", "3"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "a message of the assistant at the end", "user"),
        ('{"instruction": "q", "output": ""}', "an answer", "an empty one"),
        ('{"prompt": "q", "completion": "a", "label": "maybe"}', "true or false in 'label'", "maybe"),
        ('{"prompt": "q", "chosen": "a", "rejected": "a"}', "two different answers", "the same one twice"),
        ('{"prompt": "q", "chosen": "a", "rejected": ""}', "an answer at the end of 'rejected'", "none"),
        ('{"conversations": [{"from": "function_call", "value": "x"}]}', "the JSON of a call", "x"),
        ('{"id": "a", "kind": "chat", "mesages": []}', "fields of a record", "did you mean 'messages'"),
        ('{"id": "a", "kind": "song"}', "kind", "song"),
        ('{"problem": "p", "solution": "no box"}', "a solution with a \\boxed{} answer", "no box"),
        ('{"text": " "}', "a text", "an empty one"),
        ('{"text": "half \\ud800"}', "JSON", "hex escape"),
    ],
)
def test_a_malformed_line_says_its_number_what_was_expected_and_what_was_found(
    tmp_path: Path, row: str, expected: str, found: str
) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"instruction": "q", "output": "a"}\n\n' + row + "\n", encoding="utf-8")
    with pytest.raises(LiaoyuanError, match="line 3") as caught:
        read_examples(path)
    assert expected in str(caught.value)
    assert found in str(caught.value)
    assert "--skip-bad to go on with the 1 good records" in str(caught.value)
    records, tally = read_examples(path, skip_bad=True)
    assert (len(records), tally.rows, tally.bad_rows, tally.records) == (1, 2, 1, 1)


def test_a_file_with_nothing_of_use_is_refused_even_so(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text("{}\n" * 3)
    with pytest.raises(LiaoyuanError, match=r"no usable line of 3: line 1: .*3 such lines"):
        read_examples(path, skip_bad=True)


def test_parquet_gives_the_records_of_the_same_rows_as_json(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    asked = {"role": "user", "content": "天气?"}
    rows: list[dict[str, Any]] = [
        {"messages": [asked, call, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "Rain."}]},
        {"messages": [asked, {"role": "assistant", "content": "I do not know.", "reasoning_content": "Who does?"}]},
        {"messages": [asked]},
    ] * 700
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected, found = (read_examples(tmp_path / f"rows.{kind}", skip_bad=True) for kind in ("jsonl", "parquet"))
    assert found[0] == expected[0] and found[1].to_dict() == expected[1].to_dict()
    assert len(found[0]) == 1400 and found[1].bad_rows == 700
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    for name, reason in (("torn", "is torn or no Parquet"), ("missing", "does not exist")):
        with pytest.raises(LiaoyuanError, match=reason):
            read_examples(tmp_path / f"{name}.parquet")


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LiaoyuanError, match=r"pip install 'liaoyuan\[parquet\]'.*or write the file as JSON lines"):
        read_examples(tmp_path / "examples.parquet")


def test_bad_lines_are_counted_by_what_is_wrong(tmp_path: Path) -> None:
    good, torn, empty = '{"prompt": "q", "completion": "a"}', '{"prompt"', '{"prompt": "q", "completion": ""}'
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([good, torn, empty, torn, good, empty, torn]))
    examples = Examples(path)
    assert len(list(examples)) == 2
    assert {what: (place.count, place.line) for what, place in examples.tally.bad.items()} == {
        "JSON": (3, 2),
        "an answer": (2, 3),
    }


def test_what_is_left_out_of_good_rows_is_told(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    rows = [{"messages": [USER, GOOD, USER], "mood": "good"}, {"messages": [USER, GOOD], "mood": "bad", "source": "me"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    records, tally = read_examples(path)
    assert {what: (place.count, place.line) for what, place in tally.left_out.items()} == {
        "turns after the last answer": (1, 1),
        "field 'mood'": (2, 1),
    }
    assert [record.source for record in records] == ["", "me"]


def test_a_json_array_is_read_item_by_item_with_line_numbers(tmp_path: Path) -> None:
    rows = [{"instruction": "q\n1", "output": "a"}, {"instruction": "q"}, {"instruction": "q", "output": "a"}]
    for name, text in (("a.json", json.dumps(rows, indent=1)), ("b.json", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(text)
        records, tally = read_examples(tmp_path / name, skip_bad=True)
        assert len(records) == 2
        ((_, place),) = tally.bad.items()
        assert place.line == (6 if name == "a.json" else 2)
    (tmp_path / "half.json").write_text('[{"text": "half \\ud800"}]')
    with pytest.raises(LiaoyuanError, match=r"line 1: expected JSON, .*hex escape"):
        read_examples(tmp_path / "half.json")
    (tmp_path / "torn.json").write_text('[{"instruction": "q", "output": "a"},\n {"instr')
    with pytest.raises(LiaoyuanError, match="line 2: expected a JSON array of objects"):
        read_examples(tmp_path / "torn.json")


def test_converting_gives_records_that_are_read_as_they_were_made(tmp_path: Path) -> None:
    source, out = tmp_path / "alpaca.jsonl.zst", tmp_path / "records.jsonl.zst"
    rows = [{"instruction": f"q{n}", "output": "a"} for n in range(5)] + [
        {"prompt": "q", "chosen": "g", "rejected": "b"}
    ]
    source.write_bytes(zstandard.compress("\n".join(map(json.dumps, rows)).encode()))
    tally = convert_file(source, out, licence="MIT")
    assert dict(tally.layouts) == {"Alpaca": 5, "preference": 1}
    records, again = read_examples(out)
    assert records == read_records(out)
    assert {record.licence for record in records} == {"MIT"}
    assert dict(again.layouts) == {"record": 6}
    with pytest.raises(LiaoyuanError, match="another name"):
        convert_file(out, out)
    source.write_bytes(zstandard.compress(b'{"instruction": "q", "output": "a"}\n{}'))
    with pytest.raises(LiaoyuanError, match="line 2"):
        convert_file(source, tmp_path / "none.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["alpaca.jsonl.zst", "records.jsonl.zst"] or not (
        tmp_path / "none.jsonl"
    ).exists()


def test_records_of_before_are_read_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(
        '{"id": "1/slow", "messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2", '
        '"think": "t", "weight": 0.5}], "task": "addition", "answer": "2", "level": 1, "source": "generated"}\n'
    )
    (record,) = read_records(path)
    assert read_examples(path)[0] == [record]
    assert record.messages[1] == Message(role="assistant", content="2", think="t", weight=0.5)


COUNTS = {
    "sft/crosswoz_task_zh": 1000,
    "sft/dpo_en": 300,
    "sft/dpo_zh": 300,
    "sft/identity_template": 91,
    "sft/kdconv_multiturn_zh": 900,
    "sft/llamafactory_en": 999,
    "sft/llamafactory_zh": 1000,
    "sft/pubmedqa_train": 500,
    "sft/selfinstruct_seed": 175,
    "sft/toolcall_en": 300,
    "sft/toolcall_zh": 300,
    "reason/ape210k_valid_zh": 4995,
    "reason/code_exercism_py": 140,
    "reason/code_mbpp_train": 347,
    "reason/folio_train": 1004,
    "reason/gsm8k_train": 7471,
    "reason/math_train4500": 4456,
    "reason/strategyqa_train": 2061,
    "reason/tal_scq_en_train": 2896,
    "reason/tal_scq_zh_train": 2689,
    "eval/aqua": 508,
    "eval/svamp": 1000,
}
ONE_OPTION = 6  # of TAL-SCQ's Chinese rows have one option, which says where to write the answer


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not on this machine")
@pytest.mark.parametrize("name", COUNTS)
def test_public_files_are_converted_whole(name: str) -> None:
    examples = Examples(SHARED / f"{name}.jsonl.zst")
    records = list(examples)
    assert examples.tally.rows == COUNTS[name]
    assert examples.tally.bad_rows == COUNTS[name] - len(records) == (ONE_OPTION if "tal_scq_zh" in name else 0)
    if name.startswith(("reason", "eval")):
        assert all(record.answer for record in records)
    if "gsm8k" in name:
        assert records[0].answer == "72"
        assert "<<" not in records[0].messages[1].think
    if "toolcall" in name:
        assert sum(len(message.tool_calls) for record in records for message in record.messages) > 200
