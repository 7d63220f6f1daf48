"""Hosts agree on who runs together, whatever their clocks say and whoever is lost."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from liaoyuan.compute import meeting as module
from liaoyuan.compute.board import Board, Member, Round, Seat, Verdict
from liaoyuan.compute.meeting import Meeting, Place, Rules
from liaoyuan.compute.pulse import Pulse

SECOND = 0.05  # of real time is one second of the meetings below


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BEAT", "STALE", "LAST_CALL"):
        monkeypatch.setattr(module, name, getattr(module, name) * SECOND)


class Host(threading.Thread):
    """A host that goes to a meeting; its clock is `offset` seconds ahead of the others'."""

    def __init__(self, folder: Path, name: str, rules: Rules, offset: float = 0.0, slots: int = 2) -> None:
        super().__init__(daemon=True)
        member = Member(f"{name}-0-x", name, "machine", "127.0.0.1", slots)
        self.meeting = Meeting(Board(folder), member, rules, clock=lambda: time.monotonic() + offset)
        self.places: list[Place | None] = []
        self.error: Exception | None = None
        self.lost = threading.Event()
        self.start()

    def run(self) -> None:
        """Join round after round until the work is done; `fail` and `lose` interfere."""
        self.meeting._board.open()
        beating = threading.Thread(target=self._beat, daemon=True)
        beating.start()
        try:
            while not self.lost.is_set():
                place = self.meeting.join(self.lost.is_set)
                self.places.append(place)
                if place is None:
                    return
                wait_for(lambda: self.lost.is_set() or self.meeting.verdict is not None)
                if self.meeting.verdict and self.meeting.verdict.outcome == "done":
                    return
        except Exception as error:
            self.error = error

    def _beat(self) -> None:
        while not self.lost.wait(module.BEAT):
            self.meeting.tick()

    def round(self, number: int) -> Place:
        """Wait for this host's place in its `number`-th round."""
        wait_for(lambda: len(self.places) >= number)
        place = self.places[number - 1]
        assert place is not None
        return place

    def shares(self, number: int) -> list[tuple[str, int]]:
        return [(seat.host, seat.processes) for seat in self.round(number).round.seats]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("offset", [0.0, 7200.0, -7200.0])
def test_hosts_whose_clocks_disagree_by_hours_meet_and_keep_each_other(
    offset: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: pytest.fail("no wall clock may be read"))
    rules = Rules(hosts=(2, 2), smallest=4, lost_after=8 * module.BEAT)
    hosts = [Host(tmp_path, "a", rules), Host(tmp_path, "b", rules, offset)]
    assert hosts[0].shares(1) == hosts[1].shares(1) == [("a", 2), ("b", 2)]
    for _ in range(3 * 8):  # three times the limit after which a host counts as lost
        for file in tmp_path.glob("member-*"):
            try_to_date(file)
        threading.Event().wait(module.BEAT)
    assert hosts[0].meeting.verdict is None and hosts[1].meeting.verdict is None
    for host in hosts:
        host.lost.set()


def try_to_date(file: Path) -> None:
    try:
        os.utime(file, (0, 0))
    except FileNotFoundError:
        return


def test_when_the_first_host_is_lost_the_next_one_leads(tmp_path: Path) -> None:
    rules = Rules(hosts=(1, 3), smallest=1, lost_after=6 * module.BEAT)
    a, b, c = (Host(tmp_path, name, rules) for name in "abc")
    assert a.shares(1) == b.shares(1) == c.shares(1) == [("a", 2), ("b", 2), ("c", 2)]
    assert a.round(1).index == 0 and a.round(1).listener is not None and b.round(1).listener is None
    a.lost.set()
    assert b.shares(2) == c.shares(2) == [("b", 2), ("c", 2)]
    assert b.round(2).listener is not None
    b.lost.set(), c.lost.set()


def test_a_failure_anywhere_ends_the_round_everywhere(tmp_path: Path) -> None:
    rules = Rules(hosts=(2, 2), smallest=2)
    a, b = (Host(tmp_path, name, rules) for name in "ab")
    a.round(1), b.round(1)
    b.meeting.end("rank 3 was killed")
    assert b.round(2).round.number == a.round(2).round.number == 2
    assert Board(tmp_path).verdict(1) == Verdict("again", "rank 3 was killed")
    a.lost.set(), b.lost.set()


def test_only_a_number_that_divides_the_work_runs_and_the_rest_are_spares(tmp_path: Path) -> None:
    rules = Rules(hosts=(1, 3), smallest=1, legal=lambda n: n in (1, 2, 4), lost_after=6 * module.BEAT)
    a, b, c = (Host(tmp_path, name, rules) for name in "abc")
    assert a.shares(1) == b.shares(1) == [("a", 2), ("b", 2)] and c.places == []
    b.lost.set()
    assert c.shares(1) == a.shares(2) == [("a", 2), ("c", 2)]
    a.lost.set(), c.lost.set()


def test_a_host_that_comes_later_is_taken_in_gently(tmp_path: Path) -> None:
    rules = Rules(hosts=(1, 2), smallest=1)
    a = Host(tmp_path, "a", rules)
    assert a.shares(1) == [("a", 2)]
    b = Host(tmp_path, "b", rules)
    assert b.shares(1) == a.shares(2) == [("a", 2), ("b", 2)]
    assert Board(tmp_path).verdict(1) == Verdict("again", "b has come", gentle=True)
    a.lost.set(), b.lost.set()


def test_what_dead_launchers_left_behind_holds_nobody_up(tmp_path: Path) -> None:
    rules = Rules(hosts=(2, 2), smallest=2)
    old = [Host(tmp_path, name, rules) for name in "ab"]
    for host in old:
        host.round(1)
    for host in old:
        host.lost.set()
    new = [Host(tmp_path, name, rules) for name in "cd"]
    assert new[0].shares(1) == new[1].shares(1) == [("c", 2), ("d", 2)]
    for host in new:
        host.lost.set()


def test_a_round_and_its_end_are_what_the_first_said(tmp_path: Path) -> None:
    board = Board(tmp_path)
    mine, other = (Round(1, (Seat(name, name, 2),), "127.0.0.1", 1) for name in "ab")
    assert board.propose(mine) and not board.propose(other)
    board.end(1, Verdict("again", "first"))
    board.end(1, Verdict("done"))
    assert board.latest() == mine and board.verdict(1) == Verdict("again", "first")
    assert {path.name for path in tmp_path.iterdir()} == {"round-000001.json", "verdict-000001.json"}


def test_a_pulse_is_a_change_and_nothing_else() -> None:
    now = 0.0
    pulse = Pulse(lambda: now)
    pulse.see("a", "5")
    now = 3.0
    pulse.see("a", "5")
    assert pulse.age("a") == 3.0 and not pulse.has_changed("a")
    pulse.see("a", "4")  # smaller, as of a clock put back: a change all the same
    assert pulse.age("a") == 0.0 and pulse.has_changed("a")
