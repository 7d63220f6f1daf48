"""Run folders are read as they are: while they are written, after a kill, whatever is in them; and nothing else is."""

import json
import math
import multiprocessing
import os
import unicodedata
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Lock, Metrics
from liaoyuan.runs import Absent, Curves, Filter, Folder, Steps, describe, find_runs, open_run, read_findings, visible
from liaoyuan.runs.curves import thin
from tests.runs.making import HOSTILE, make_run, rollout, row, write_metrics, write_rollouts

HIDDEN = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}  # Unicode's classes of such characters


def test_no_character_that_hides_or_turns_text_is_left_as_it_is():
    left = [each for each in map(chr, range(0x110000)) if visible(each) == each and each not in "\n\t"]
    assert [each for each in left if unicodedata.category(each) in ("Cc", "Cs")] == []
    assert [each for each in left if unicodedata.bidirectional(each) in HIDDEN] == []


@given(st.text(st.characters()))
def test_nothing_that_hides_or_turns_text_is_left_in_it(text):
    shown = visible(text + HOSTILE)
    assert all(each in "\n\t" or unicodedata.category(each) not in ("Cc", "Cs") for each in shown)
    assert all(unicodedata.bidirectional(each) not in HIDDEN for each in shown)
    shown.encode("utf-8")
    assert "␛[31m" in shown and "⟨U+202E⟩" in shown and "⟨U+D800⟩" in shown and "<script>" in shown


def test_ordinary_text_is_shown_as_it_is():
    text = "烈火燎原 → 42\tand\nחושב \U0001f525 émile ❤\ufe0f"
    assert visible(text) == text


def test_curves_follow_a_file_that_is_being_written(tmp_path):
    write_metrics(tmp_path, [row(0), row(1)])
    curves = Curves(Folder(tmp_path)).follow()
    whole = json.dumps(row(2, loss=1.5)) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for part in (whole[:20], whole[20:-1]):
            file.write(part)
            file.flush()
            assert curves.follow().rows == 2, "a torn last line waits for its end"
        file.write(whole[-1])
    assert curves.follow().rows == 3 and curves.curve("loss").x == [2] and curves.last("reward") == row(2)["reward"]
    assert len({len(column) for column in curves.columns.values()}) == 1


def test_a_resumed_run_is_read_anew(tmp_path):
    write_metrics(tmp_path, [row(step) for step in range(10)])
    curves = Curves(Folder(tmp_path)).follow()
    metrics = Metrics(tmp_path / "metrics.jsonl", resume_from=5)
    metrics.write(5, reward=0.9)
    metrics.close()
    assert curves.follow().curve("reward").x == [0, 1, 2, 3, 4, 5] and curves.last("reward") == 0.9
    (tmp_path / "metrics.jsonl").unlink()
    assert curves.follow().rows == 0


def test_what_is_no_row_is_passed_over(tmp_path):
    rows = ['{"step": 0, "a": 1}', "[]", "no", '{"a": 2}', '{"step": true}', '{"step": "1"}', "[" * 100_000]
    rows += ['{"step": 1, "a": NaN, "b": 1e999, "c": 1' + "0" * 400 + ', "d": {"e": 2, "f": "x"}, "g": [1], "h": true}']
    rows += ['{"step": 2, "text": "' + "x" * 3_000_000 + '"}', '{"step": 3, "a": 4}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    curves = Curves(Folder(tmp_path)).follow()
    assert curves.curve("a").x == [0, 3] and curves.curve("d.e").y == [2.0]
    assert {"g", "h", "d.f"} & set(curves.columns) == set()
    assert all(math.isfinite(value) for name in curves.columns for value in curves.curve(name).y)


def test_many_points_become_few_and_spikes_stay():
    points = [(float(x), math.sin(x / 500)) for x in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    kept = thin(points, 1000)
    assert len(kept) <= 1002 and (77_777.0, 50.0) in kept
    assert kept[0] == points[0] and kept[-1] == points[-1] and kept == sorted(kept)


def test_nothing_outside_the_folder_is_read(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    make_run(outside, 3)
    make_run(inside / "run", 3)
    (inside / "link").symlink_to(outside)
    (inside / "half").mkdir()
    (inside / "half" / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    (inside / "half" / "config.toml").symlink_to(outside / "config.toml")
    (inside / "run" / "result.json").symlink_to("/etc/passwd")
    os.mkfifo(inside / "run" / "findings.jsonl")
    folder = Folder(inside)
    assert find_runs(folder) == ["run"]
    assert folder.read("run", "result.json", most=100) == "" and read_findings(folder.below("run")) == []
    for name in ("..", "../outside", "link", ".", "", "run/../../outside", "/etc", "run\0", "\ud800"):
        with pytest.raises(Absent):
            folder.below(*name.split("|")).entries()
        assert folder.status(name, "metrics.jsonl") is None
    with pytest.raises(Absent):
        Steps(folder.below("link")).read(0)


def test_runs_are_found_at_any_depth_and_parts_of_a_run_are_none(tmp_path):
    for name in ("a", "b/c/d", "a/model", "a/state", ".hidden"):
        write_metrics(tmp_path / name, [row(0)])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text("")
    (tmp_path / "begun" / ".lock").write_text("{}")
    assert find_runs(Folder(tmp_path)) == ["a", "b/c/d", "begun"]
    assert find_runs(Folder(tmp_path / "a")) == ["."]
    with pytest.raises(LiaoyuanError, match="there are runs in it: a, b/c/d"):
        open_run(tmp_path)
    with pytest.raises(Absent):
        find_runs(Folder(tmp_path / "none"))


def hold(folder: Path, held, until) -> None:
    lock = Lock(folder)
    lock.take()
    held.set()
    until.wait()


def test_the_files_tell_whether_a_run_runs_was_killed_or_ended(tmp_path):
    make_run(tmp_path, 3, total=6)

    def state() -> str:
        return describe(Folder(tmp_path), "run", Curves(Folder(tmp_path)).follow()).state

    assert state() == "stopped"
    context = multiprocessing.get_context("fork")
    held, until = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, until))
    process.start()
    held.wait(60)
    assert state() == "running"
    process.kill()
    process.join()
    assert state() == "stopped", "the kernel opened the lock of the killed process"
    (tmp_path / "result.json").write_text("{}")
    assert state() == "ended"


@pytest.mark.parametrize(
    ("config", "kind", "total"),
    [
        ('model = "m"\ntask = "t"\n[rl]\nsteps = 7\n', "rl", 7),
        ('model = "m"\ndata = "d"\n[train]\nsteps = 8\n', "sft", 8),
        ('model = "m"\ndata = "d"\n[train]\nsteps = 8\n[dpo]\nbeta = 0.1\n', "dpo", 8),
        ("[model]\nhidden_size = 8\n[train]\nsteps = 9\n", "pretrain", 9),
        ("", "rl", None),  # its metrics have a reward
        ("torn = [", "rl", None),
    ],
)
def test_a_run_s_kind_and_length_are_told_by_its_config(tmp_path, config, kind, total):
    write_metrics(tmp_path, [row(0)])
    (tmp_path / "config.toml").write_text(config)
    run = describe(Folder(tmp_path), "run", Curves(Folder(tmp_path)).follow())
    assert (run.kind, run.total, run.done) == (kind, total, 1)


def test_findings_of_the_same_thing_are_one_and_the_worst_is_first(tmp_path):
    rows = [
        {"step": 3, "name": "gap", "severity": "warning", "what": "old", "do": "x"},
        {"step": 9, "name": "gap", "severity": "warning", "what": "new", "do": "x"},
        {"step": 5, "name": "entropy", "severity": "error", "what": HOSTILE, "do": None},
        {"step": "?", "severity": {"a": 1}},
    ]
    text = "".join(json.dumps(each) + "\n" for each in rows) + '[]\nno\n{"step": 1, "na'
    (tmp_path / "findings.jsonl").write_text(text)
    found = read_findings(Folder(tmp_path))
    assert [(each.name, each.severity, each.first, each.last, each.times) for each in found] == [
        ("entropy", "error", 5, 5, 1),
        ("gap", "warning", 3, 9, 2),
        ("", "note", 0, 0, 1),
    ]
    assert found[1].what == "new" and "\x1b" not in found[0].what


def test_rollouts_that_are_wrong_torn_or_hostile_are_read_as_far_as_they_are_rollouts(tmp_path):
    strange = {"step": {}, "group": 1e300, "sample": "x", "text": 5, "thought": None, "reward": True, "tokens": -1}
    raw = b'[1]\nnull\nno json\n{"torn": '
    write_rollouts(tmp_path, 7, [rollout(7, 1, 0), strange, rollout(7, 0, 1, text=HOSTILE)], raw)
    step = Steps(Folder(tmp_path)).read(7)
    assert [(one.group, one.sample) for one in step.rollouts] == [(0, 0), (0, 1), (1, 0)]
    assert step.unread == 4 and step.whole
    assert step.rollouts[0].text == "5" and step.rollouts[1].text == visible(HOSTILE)
    path = write_rollouts(tmp_path, 8, [rollout(8, group, 0, text=os.urandom(40_000).hex()) for group in range(9)])
    path.write_bytes(path.read_bytes()[:200_000])
    torn = Steps(Folder(tmp_path)).read(8)
    assert 1 <= len(torn.rollouts) < 9
    (tmp_path / "rollouts" / "000009.jsonl.zst").write_bytes(b"no such format")
    assert Steps(Folder(tmp_path)).read(9).rollouts == () and not Steps(Folder(tmp_path)).read(9).whole


def test_a_small_file_that_unpacks_to_much_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("liaoyuan.runs.rollouts.MOST_BYTES", 2**20)
    path = write_rollouts(tmp_path, 0, [rollout(0, 0, 0)], b"0" * 2**26 + b"\n")
    assert path.stat().st_size < 20_000
    step = Steps(Folder(tmp_path)).read(0)
    assert len(step.rollouts) == 1 and not step.whole


def test_a_step_that_was_written_anew_is_read_anew(tmp_path):
    steps = Steps(Folder(tmp_path))
    assert steps.numbers() == []
    write_rollouts(tmp_path, 4, [rollout(4, 0, 0)])
    assert len(steps.read(4).rollouts) == 1 and steps.read(4) is steps.read(4)
    write_rollouts(tmp_path, 4, [rollout(4, 0, 0), rollout(4, 0, 1)])
    (tmp_path / "rollouts" / "notes.txt").write_text("")
    assert len(steps.read(4).rollouts) == 2 and steps.numbers() == [4]
    (tmp_path / "rollouts" / "000004.jsonl.zst").unlink()
    with pytest.raises(Absent):
        steps.read(4)


def test_filters_say_which_rollouts_are_wanted(tmp_path):
    rows = [rollout(0, 0, 0), rollout(0, 1, 1, flaw="cut off", text="ABC"), rollout(0, 2, 0, reward=None, task="maze")]
    rows.append(rollout(0, 3, 0, reward=0.5))
    write_rollouts(tmp_path, 0, rows)
    rollouts = Steps(Folder(tmp_path)).read(0).rollouts

    def wanted(**how) -> list[int]:
        return [one.group for one in rollouts if Filter(**how)(one)]

    assert wanted() == [0, 1, 2, 3]
    assert [wanted(verdict=each) for each in ("right", "wrong", "unjudged", "partly")] == [[0], [1], [2], [3]]
    assert wanted(level=3) == [1, 3] and wanted(task="maze") == [2] and wanted(words="abc") == [1]
    assert wanted(flaw="any") == [1] and wanted(flaw="none") == [0, 2, 3] and wanted(flaw="cut off") == [1]


def test_a_bomb_of_zstandard_needs_little_memory(tmp_path):
    """A frame that asks for a huge window is refused, not obeyed."""
    (tmp_path / "rollouts").mkdir()
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "rollouts" / "000000.jsonl.zst"
    path.write_bytes(stream.compress(b'{"step": 0}\n' * 100) + stream.flush())
    step = Steps(Folder(tmp_path)).read(0)
    assert step.rollouts == () and not step.whole
