"""Who is to blame when nothing goes on, and who when somebody ends."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from liaoyuan.compute.heartbeat import LOST_PEER, lost_peer, read_beat
from liaoyuan.compute.launcher import History, how_it_ended
from liaoyuan.compute.report import first_failure, last_lines, worker_sentence
from liaoyuan.compute.watchdog import GRACE, Orders, Watch, state_of
from tests.compute.job import PATIENCE
from tests.conftest import ROOT

SCRIPT = """
import sys, time
from pathlib import Path
from liaoyuan.compute.heartbeat import Heartbeat
from liaoyuan.rundir import Progress
beat = Heartbeat(Path(sys.argv[1]), int(sys.argv[2]))
exec(compile("def work():\\n beat(Progress(3, 10))\\n time.sleep(600)", sys.argv[3], "exec"))
work()
"""
COLLECTIVE = "site-packages/torch/distributed/distributed_c10d.py"


class Workers:
    """Processes that beat once and then do nothing, each in a file of the given name."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder = folder
        self.now = 0.0
        self.said: list[str] = []
        self.processes = [
            subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(rank), file], cwd=ROOT)
            for rank, file in enumerate(files)
        ]
        for rank, process in enumerate(self.processes):
            while not ((beat := read_beat(folder, rank)) and beat.done):
                assert process.poll() is None
            while state_of(process.pid) != "S":  # it has not gone to sleep yet
                pass
        self.watch = Watch(self.pids, folder, Orders, 60.0, self.said.append, clock=lambda: self.now)

    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in enumerate(self.processes)}

    def pass_minutes(self, minutes: float) -> None:
        """Look, let time pass, and look again."""
        self.watch.look()
        self.now += 60 * minutes
        self.watch.look()

    def stop(self, rank: int) -> None:
        """Stop a worker, and wait until it has stopped."""
        self.processes[rank].send_signal(signal.SIGSTOP)
        while state_of(self.processes[rank].pid) != "T":
            pass

    def exit_codes(self) -> list[int | None]:
        for rank in self.watch.hung:
            self.processes[rank].wait(PATIENCE)
        return [process.poll() for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def started() -> Iterator[list[Workers]]:
    workers: list[Workers] = []
    yield workers
    for group in workers:
        group.end()


def test_the_worker_outside_the_collective_is_to_blame(started: list[Workers], tmp_path: Path) -> None:
    workers = Workers(tmp_path, [COLLECTIVE, "data/reading.py", COLLECTIVE])
    started.append(workers)
    workers.pass_minutes(0.9)
    assert workers.said == []
    workers.pass_minutes(0.2)
    assert workers.watch.hung == {1: "is in work (data/reading.py:3) while others wait for it"}
    assert workers.exit_codes() == [None, -signal.SIGKILL, None]
    assert "rank 1 (process" in workers.said[0] and "no step for 60 s, so it is killed" in workers.said[0]


def test_a_worker_that_is_stopped_is_to_blame(started: list[Workers], tmp_path: Path) -> None:
    workers = Workers(tmp_path, [COLLECTIVE, COLLECTIVE])
    started.append(workers)
    workers.stop(0)
    workers.pass_minutes(1.1)
    assert workers.watch.hung == {0: "is stopped (SIGSTOP)"}
    assert workers.exit_codes() == [-signal.SIGKILL, None]


def test_where_all_wait_other_hosts_get_time_first(started: list[Workers], tmp_path: Path) -> None:
    workers = Workers(tmp_path, [COLLECTIVE, COLLECTIVE])
    started.append(workers)
    workers.pass_minutes(1.1)
    assert workers.watch.hung == {} and "the workers of this host all wait for others" in workers.said[0]
    workers.pass_minutes(1.1)
    assert workers.watch.hung.keys() == {0, 1}
    assert workers.exit_codes() == [-signal.SIGKILL, -signal.SIGKILL]


def test_workers_are_asked_to_save_once_and_killed_when_told_so(started: list[Workers], tmp_path: Path) -> None:
    workers = Workers(tmp_path, [COLLECTIVE, COLLECTIVE])
    started.append(workers)
    orders = Orders(stop=True)
    watch = Watch(workers.pids, tmp_path, lambda: orders, 60.0, workers.said.append)
    workers.stop(0)  # it will not even hear of it
    watch.look()
    assert workers.processes[1].wait(PATIENCE) == -signal.SIGTERM
    assert workers.processes[0].poll() is None
    orders = Orders(stop=True, kill=True)
    watch.look()
    assert workers.processes[0].wait(PATIENCE) == -signal.SIGKILL
    assert watch.ended == {0}


def test_workers_that_wait_for_one_that_died_are_ended(started: list[Workers], tmp_path: Path) -> None:
    workers = Workers(tmp_path, [COLLECTIVE, COLLECTIVE])
    started.append(workers)
    workers.processes[1].kill()
    while state_of(workers.processes[1].pid) != "Z":
        pass
    workers.watch.look()
    assert workers.processes[0].poll() is None
    workers.now += GRACE + 1
    workers.watch.look()
    assert workers.processes[0].wait(PATIENCE) == -signal.SIGKILL
    assert workers.watch.ended == {0} and workers.watch.hung == {}


def test_the_first_to_fail_is_not_the_one_that_lost_it() -> None:
    assert first_failure({0: LOST_PEER, 1: -9, 2: LOST_PEER}) == 1
    assert first_failure({0: LOST_PEER, 2: 1, 1: 1}) == 2
    assert first_failure({0: -9, 1: 1}, ended={0}) == 1
    assert first_failure({0: -9, 1: -9}, hung={1: "is stopped"}) == 1
    assert first_failure({0: -15, 1: LOST_PEER}) == 1
    assert first_failure({}) is None
    assert how_it_ended(-9) == "was killed by SIGKILL" and how_it_ended(3) == "ended with exit code 3"


def test_a_lost_connection_is_told_from_other_errors() -> None:
    try:
        try:
            raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
        except RuntimeError:
            raise ValueError("while closing") from None
    except ValueError as error:
        assert lost_peer(error) == "Connection closed by peer"
    assert lost_peer(RuntimeError("shapes do not fit")) is None


def test_tries_that_come_further_are_not_counted() -> None:
    history = History(max_restarts=2)
    assert [history.note(steps) for steps in (10, 20, 30)] == [0, 0, 0]
    assert [history.note(steps) for steps in (30, 25)] == [1, 2] and not history.is_hopeless
    assert history.note(31) == 0 and history.pause == 0.0
    for _ in range(3):
        history.note(31)
    assert history.is_hopeless


def test_the_last_words_of_a_worker(tmp_path: Path) -> None:
    (tmp_path / "rank-0001.err").write_text(
        "\n".join(f"line {n}" for n in range(30)) + "\nliaoyuan: The disk is full.\n"
    )
    shown = last_lines(tmp_path, 1)
    assert len(shown.splitlines()) == 12 and shown.endswith("    liaoyuan: The disk is full.")
    assert worker_sentence(shown) == "The disk is full."
    assert last_lines(tmp_path, 2) == "" and worker_sentence("") == ""
