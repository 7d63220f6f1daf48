"""What is written in a run folder is whole or absent, whatever kills the process and however full the disk is."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from liaoyuan import rundir
from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import (
    TEMPORARY,
    Metrics,
    atomic_folder,
    read_json,
    read_metrics,
    remember,
    sweep,
    write_atomic,
    write_json,
)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY)]


def fail_with(monkeypatch, number: int, name: str = "fsync") -> None:
    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir.os, name, full)


def test_a_written_file_is_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    write_atomic(path, b"old")
    write_atomic(path, "新")
    assert path.read_bytes() == "新".encode()
    assert [item.name for item in path.parent.iterdir()] == ["file.bin"]


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path):
    write_atomic(tmp_path / "ours", b"x")
    (tmp_path / "theirs").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "theirs").stat().st_mode)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path, monkeypatch, number):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    fail_with(monkeypatch, number)
    with pytest.raises(LiaoyuanError, match=r"The disk is full: .*file was not written"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_no_half_folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    with atomic_folder(path) as folder:
        (folder / "weights").write_bytes(b"old")
    fail_with(monkeypatch, errno.ENOSPC)
    with pytest.raises(LiaoyuanError, match="The disk is full"), atomic_folder(path) as folder:
        (folder / "weights").write_bytes(b"new")
    assert (path / "weights").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_folder_whose_block_fails_vanishes(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "half").write_text("x")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_the_older_one_whole(tmp_path):
    path = tmp_path / "folder"
    for name in ("first", "second"):
        with atomic_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
    assert [item.name for item in (path / "sub").iterdir()] == ["second"]
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "below", tmp_path):
        with pytest.raises(LiaoyuanError, match="cannot be written"):
            write_atomic(path, b"x")


KILLED = """
import os, signal, sys
from pathlib import Path
from liaoyuan import rundir
from liaoyuan.config import Config
left = int(sys.argv[2])
def counted(call):
    def then(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return then
for name in ("open", "fsync", "rename", "replace", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
folder = Path(sys.argv[1])
rundir.write_atomic(folder / "file", b"new" * 1000)
with rundir.atomic_folder(folder / "model") as inside:
    (inside / "weights").write_bytes(b"new" * 1000)
    (inside / "config").write_bytes(b"new")
"""


def test_killed_at_any_system_call_what_is_there_is_whole(tmp_path):
    """Kill -9 before the 1st, 2nd, ... call until the work comes to its end; old or new, never half."""
    whole = {b"old", b"new" * 1000}
    for calls in range(40):
        folder = tmp_path / str(calls)
        write_atomic(folder / "file", b"old")
        with atomic_folder(folder / "model") as inside:
            (inside / "weights").write_bytes(b"old")
            (inside / "config").write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(calls)], check=False)
        assert (folder / "file").read_bytes() in whole
        sweep(folder)
        assert leftovers(folder) == []
        pair = [(folder / "model" / name).read_bytes()[:3] for name in ("weights", "config")]
        assert pair[0] == pair[1]
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert done.returncode == 0 and calls > 5


def test_metrics_of_a_resumed_run_hold_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(10):
        metrics.write(step, loss=float(step))
    metrics.close()
    metrics = Metrics(path, resume_from=6)
    for step in range(6, 12):
        metrics.write(step, loss=-float(step))
    metrics.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["loss"] for row in rows] == [float(step) if step < 6 else -float(step) for step in range(12)]


def test_a_torn_last_line_is_ignored_and_cut_off_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste', encoding="utf-8")
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    metrics = Metrics(path, resume_from=2)
    metrics.write(2)
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_fresh_run_starts_with_no_rows_of_an_older_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n', encoding="utf-8")
    Metrics(path).close()
    assert read_metrics(path) == []
    assert read_metrics(tmp_path / "none") == []


def test_json_comes_back_as_it_went_and_bad_json_is_one_sentence(tmp_path):
    value = {"名": [1, 2.5, None, True], "nested": {"a": "b"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(LiaoyuanError, match="is not valid JSON"):
        read_json(tmp_path / "torn.json")
    with pytest.raises(LiaoyuanError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_sweeping_removes_only_what_a_killed_process_left(tmp_path):
    (tmp_path / f"{TEMPORARY}a").write_text("x")
    (tmp_path / f"{TEMPORARY}b").mkdir()
    (tmp_path / "kept").write_text("x")
    sweep(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["kept"]


class Settings(Config):
    steps: int = 3
    rate: float = 0.1
    note: str | None = None


def test_a_run_goes_on_under_a_newer_program_that_has_more_settings(tmp_path):
    (tmp_path / "config.toml").write_text("steps = 5\n")
    remember(Settings(steps=5), tmp_path, has_begun=True)
    assert "rate = 0.1" in (tmp_path / "config.toml").read_text()
    for changed, said in (
        (Settings(steps=6), "steps = 5, not 6"),
        (Settings(steps=5, rate=0.2), "rate = 0.1, not 0.2"),
    ):
        with pytest.raises(LiaoyuanError, match=said):
            remember(changed, tmp_path, has_begun=True)
    (tmp_path / "config.toml").write_text("steps = 5\ngone = true\n")
    with pytest.raises(LiaoyuanError, match="gone = True, not None"):
        remember(Settings(steps=5), tmp_path, has_begun=True)
