"""What the command line says while it works."""

import pytest

from liaoyuan.cli import progress
from liaoyuan.cli.process import available_cores, tune_allocator, tune_process
from liaoyuan.rundir import Progress


def test_a_log_gets_few_lines_with_rate_and_time_left(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.bar("Pretraining") as report:
        for done in range(101):
            report(Progress(done, 100, "step", "loss 2.5"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 40
    assert "step/s" in lines[1] and "left" in lines[1] and "loss 2.5" in lines[1]
    assert lines[-1].startswith("Pretraining: 100%") and "in " in lines[-1]


def test_what_comes_after_has_a_rate_of_its_own(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.bar("DPO") as report:
        for done in range(1, 101):
            report(Progress(done, 100, "step"))
        for done in range(1, 41):
            report(Progress(done, 40, "pass"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert "40/40 pass" in last and "in 0:" in last, "the seconds of the passes alone"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture) -> None:
    with progress.bar("Pretraining", quiet=True) as report:
        report(Progress(1, 2))
    assert capsys.readouterr().err == ""


def test_times_read_as_clocks() -> None:
    assert [progress.clock_time(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_the_user_chooses_the_threads(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    settings = tune_process()
    assert (settings.threads, settings.threads_from) == (3, "OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert tune_process().threads == available_cores()


def test_the_allocator_keeps_its_pages_here() -> None:
    assert tune_allocator() is True  # glibc on Linux, where the suite runs


def test_a_note_is_said_once_however_soon_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("RL") as report:
        report(Progress(1, 9, "step", "reward 0.1"))
        report(Progress(2, 9, "step", "reward 0.2", note="warning: 61% of the groups are all wrong."))
        report(Progress(3, 9, "step", "reward 0.3"))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "all wrong" in line] == ["RL: warning: 61% of the groups are all wrong."]
    assert not any("reward 0.3" in line for line in lines)
