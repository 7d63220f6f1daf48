"""What a launcher does between two tries."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from liaoyuan.compute import launcher as module
from liaoyuan.compute.heartbeat import LOST_PEER
from liaoyuan.compute.launcher import History, LaunchConfig, RoundEnd, next_try
from liaoyuan.errors import LiaoyuanError


@dataclass
class Hosts:
    """Stands for the meeting: remembers what it is told."""

    slots: int = 4
    ended: list[str] = field(default_factory=list)

    def end(self, reason: str) -> None:
        self.ended.append(reason)

    def offer(self, slots: int) -> None:
        self.slots = slots


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)


def tries(hosts: Hosts, *ends: RoundEnd, processes: tuple[int, int] = (2, 4)) -> list[str]:
    said: list[str] = []
    history = History(max_restarts=3)
    for end in ends:
        next_try(end, history, LaunchConfig(processes, Path("logs")), hosts, said.append)
    return said


def failure(
    steps: int, code: int = 1, reason: str = "rank 1 on vm ended with exit code 1", output: str = ""
) -> RoundEnd:
    return RoundEnd(False, steps, 1, code, reason, output)


def test_a_host_whose_workers_fail_again_and_again_offers_fewer_processes() -> None:
    hosts = Hosts()
    said = tries(hosts, failure(10), failure(10))
    assert hosts.slots == 4
    said = tries(hosts, failure(10), failure(10), failure(10))
    assert hosts.slots == 3 and said[-1] == "this host offers 3 processes from now on."
    tries(hosts, failure(10), failure(10), failure(10), processes=(3, 4))
    assert hosts.slots == 3  # the fewest that were asked for


def test_a_host_that_only_lost_another_one_keeps_its_processes() -> None:
    hosts = Hosts()
    tries(hosts, *[failure(10, LOST_PEER)] * 4)
    assert hosts.slots == 4 and len(hosts.ended) == 4


def test_it_gives_up_with_the_workers_own_sentence() -> None:
    full = failure(10, 2, output="    liaoyuan: The disk is full.")
    with pytest.raises(
        LiaoyuanError, match=r"Gave up after 4 tries that came no further than step 10; .*The disk is full"
    ):
        tries(Hosts(), *[full] * 5)


def test_a_refusal_is_final_only_before_anything_was_done() -> None:
    with pytest.raises(LiaoyuanError, match=r"^No corpus\.$"):
        tries(Hosts(), failure(0, 2, output="    liaoyuan: No corpus."))
    assert len(tries(Hosts(), failure(10), failure(0, 2, output="    liaoyuan: The disk is full."))) == 2


def test_workers_that_were_asked_to_stop_are_no_failure() -> None:
    said = tries(Hosts(), *[RoundEnd(False, 5, 0, module.STOPPED, "vm2 has come")] * 6)
    assert said == ["vm2 has come; all hosts meet again."] * 6
