"""How the hosts of a job agree, round after round, who runs together: the rendezvous.

The waiting host with the smallest name proposes a round, and its own seat is the first. While a round runs, that host
watches the others' signs of life and they watch its own; whoever finds one missing ends the round, and all meet again.
If the first host is lost, the next one proposes: there is no server that could be lost with it.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from liaoyuan.compute.board import Board, Member, Round, Seat, Verdict
from liaoyuan.compute.layout import Legal, any_number, choose, refusal
from liaoyuan.compute.network import LOOPBACK, listen
from liaoyuan.compute.pulse import Clock, Pulse
from liaoyuan.errors import LiaoyuanError

BEAT = 0.5  # seconds between two signs of life
STALE = 6 * BEAT  # a sign of life that has not changed for so long was left by a dead launcher
LAST_CALL = 3.0  # seconds that fewer hosts than could come wait for one more


@dataclass(frozen=True)
class Rules:
    """When a round may begin, and when a host counts as lost. Times in seconds."""

    hosts: tuple[int, int] = (1, 1)  # fewest and most
    smallest: int = 1  # fewest processes in all
    legal: Legal = any_number
    join_timeout: float = 600.0
    lost_after: float = 30.0


@dataclass(frozen=True)
class Place:
    """This host's part in a round. `listener` is the open socket of the round's store on the first host."""

    round: Round
    index: int
    listener: socket.socket | None = field(default=None, compare=False)

    @property
    def processes(self) -> int:
        return self.round.seats[self.index].processes


class Meeting:
    """One host's presence among the hosts of a job; a context manager that shows signs of life while it is open."""

    def __init__(self, board: Board, me: Member, rules: Rules, clock: Clock = time.monotonic) -> None:
        self._board, self._me, self._rules, self._clock = board, me, rules, clock
        self._pulse = Pulse(clock)
        self._place: Place | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._set, self._set_since = frozenset[str](), clock()
        self.verdict: Verdict | None = None  # of the present round

    def __enter__(self) -> "Meeting":
        self._board.open()
        _sweep(self._board, self._me)
        self._board.show(self._me)
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with self._lock, contextlib.suppress(OSError):
            self._board.leave(self._me.id)

    @property
    def host(self) -> str:
        return self._me.host

    @property
    def address(self) -> str:
        return self._me.address

    def join(self, interrupted: Callable[[], bool] = lambda: False) -> Place | None:
        """Wait for a round with a seat for this host; None if it was interrupted, or the work ended without it.

        A host that no round has a seat for waits as a spare until one of them is lost.

        Raises:
            LiaoyuanError: too few hosts came in time, or the work cannot be divided over what they offer.
        """
        last, running = self._place.round.number if self._place else 0, 0
        self._become("waiting", None)
        began = self._clock()
        self._set, self._set_since = frozenset(), began
        while not interrupted():
            found = self._board.latest()
            verdict = self._board.verdict(found.number) if found else None
            if found and verdict is None:
                if found.number > last and (place := self._seat(found)):
                    return place
                self._settle(found)
                began, running = self._clock(), found.number
            elif found and verdict and verdict.outcome == "done" and found.number == running:
                return None
            elif self._leads() and (place := self._propose(found.number + 1 if found else 1)):
                return place
            if self._clock() - began > self._rules.join_timeout:
                raise LiaoyuanError(self._nobody_came())
            self._closed.wait(BEAT / 2)
        return None

    def end(self, reason: str) -> None:
        """End the present round: this host's part of it failed."""
        if self._place:
            with contextlib.suppress(OSError):
                self._board.end(self._place.round.number, Verdict("again", reason))

    def finish(self, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the work of all hosts of this round is done; False if another round is needed after all."""
        self._become("done", self._place)
        while self.verdict is None and not interrupted():
            self._closed.wait(BEAT / 2)
        return self.verdict is None or self.verdict.outcome == "done"

    def offer(self, slots: int) -> None:
        """Offer another number of processes from the next round on."""
        with self._lock:
            self._me = replace(self._me, slots=slots)

    @property
    def slots(self) -> int:
        return self._me.slots

    def tick(self) -> None:
        """Show a sign of life and look at those of the others; called every `BEAT` seconds."""
        with self._lock:
            if self._closed.is_set():
                return
            self._me = replace(self._me, beat=self._me.beat + 1)
            with contextlib.suppress(OSError):  # a disk that is full, or gone for a moment: the next one may succeed
                self._board.show(self._me)
                if self._place and self.verdict is None:
                    self._watch(self._place)

    def _live(self) -> None:
        while not self._closed.wait(BEAT):
            self.tick()

    def _become(self, phase: str, place: Place | None) -> None:
        with self._lock:
            if place is not self._place:
                self._place, self.verdict = place, None
            number = place.round.number if place else self._me.round
            self._me = replace(self._me, phase=phase, round=number)
            with contextlib.suppress(OSError):
                self._board.show(self._me)

    def _seat(self, found: Round, listener: socket.socket | None = None) -> Place | None:
        for index, seat in enumerate(found.seats):
            if seat.id == self._me.id:
                place = Place(found, index, listener)
                for other in found.seats:
                    self._pulse.forget(other.id)
                self._become("running", place)
                return place
        return None

    def _watch(self, place: Place) -> None:
        """Learn the verdict on the present round, or pass it: the first host watches all, the others the first."""
        number, seats = place.round.number, place.round.seats
        self.verdict = self._board.verdict(number)
        if self.verdict is None and (verdict := self._judge(place.round, seats if place.index == 0 else seats[:1])):
            self._board.end(number, verdict)
            self.verdict = self._board.verdict(number)

    def _judge(self, found: Round, seats: Sequence[Seat]) -> Verdict | None:
        members = {seat.id: self._look(seat.id) for seat in seats}
        for seat in seats:
            if members[seat.id] is None and seat.id != self._me.id:
                return Verdict("again", f"{seat.host} has left")
            if seat.id != self._me.id and self._pulse.age(seat.id) > self._rules.lost_after:
                return Verdict("again", f"{seat.host} is lost: no sign of life for {self._rules.lost_after:g} s")
        if len(seats) == len(found.seats) and all(m and m.phase == "done" for m in members.values()):
            return Verdict("done")
        return self._grown(found) if len(seats) == len(found.seats) else None

    def _grown(self, found: Round) -> Verdict | None:
        """Return the verdict that makes room for hosts that wait, if more processes can run with them."""
        if len(found.seats) >= self._rules.hosts[1] or self._me.phase != "running":
            return None
        waiting = [m for m in self._present() if m.phase == "waiting"]
        slots = [seat.processes for seat in found.seats] + [m.slots for m in waiting]
        with contextlib.suppress(LiaoyuanError):
            if waiting and sum(choose(slots, self._rules.smallest, self._rules.legal)) > found.processes:
                return Verdict("again", f"{waiting[0].host} has come", gentle=True)
        return None

    def _settle(self, found: Round) -> None:
        """End a round that somebody left behind: this host waits, and nobody of that round is alive."""
        if any(seat.id == self._me.id for seat in found.seats):
            self._board.end(found.number, Verdict("again", f"{self._me.host} begins anew"))
            return
        living = [self._look(seat.id) for seat in found.seats]
        stale = [m is None or self._is_stale(m.id) for m in living]
        if all(stale):
            self._board.end(found.number, Verdict("again", "all hosts of this round are gone"))

    def _is_stale(self, member_id: str) -> bool:
        limit = self._rules.lost_after if self._pulse.has_changed(member_id) else STALE
        return self._pulse.age(member_id) > limit

    def _leads(self) -> bool:
        """Return whether every host with a smaller name is dead or runs; reads no more of them than it must."""
        for member_id in self._board.members():
            if member_id == self._me.id:
                return True
            member = self._look(member_id)
            if member and not self._is_stale(member_id) and member.phase == "waiting":
                return False
        return False  # our own sign of life is being replaced just now

    def _propose(self, number: int) -> Place | None:
        """Propose a round if enough hosts wait; None if it is too early or another host was first."""
        present = self._present()
        ids = frozenset(m.id for m in present)
        if ids != self._set:
            self._set, self._set_since = ids, self._clock()
        fewest, most = self._rules.hosts
        if any(m.phase != "waiting" for m in present) or len(present) < fewest:
            return None  # those will wait too, as soon as they see that their round has ended
        if len(present) < most and self._clock() - self._set_since < LAST_CALL:
            return None
        seats = self._seats(present[:most])
        if seats is None:
            return None
        return self._open(number, seats, present)

    def _seats(self, present: Sequence[Member]) -> list[Seat] | None:
        """Divide the processes; if the work cannot be divided, wait for more hosts while more may come."""
        try:
            shares = choose([m.slots for m in present], self._rules.smallest, self._rules.legal)
        except LiaoyuanError:
            if len(present) == self._rules.hosts[1]:
                raise
            return None
        return [Seat(m.id, m.host, share) for m, share in zip(present, shares, strict=True) if share]

    def _open(self, number: int, seats: Sequence[Seat], present: Sequence[Member]) -> Place | None:
        here = len({m.machine for m in present}) == 1
        if not here and self._me.address == LOOPBACK:
            raise LiaoyuanError(
                f"The name of this host, {self._me.host}, leads only to itself: "
                "give --address the address at which the other hosts reach it."
            )
        listener = listen(LOOPBACK if here else self._me.address)
        address, port = listener.getsockname()[:2]
        found = Round(number, tuple(seats), address, port)
        if self._board.propose(found):
            return self._seat(found, listener)
        listener.close()
        return None

    def _present(self) -> list[Member]:
        """Return the hosts that were seen to live, in the order of ranks."""
        looked = [self._look(member_id) for member_id in self._board.members()]
        return [m for m in looked if m and (m.id == self._me.id or self._lives(m.id))]

    def _lives(self, member_id: str) -> bool:
        return self._pulse.has_changed(member_id) and not self._is_stale(member_id)

    def _look(self, member_id: str) -> Member | None:
        member = self._me if member_id == self._me.id else self._board.member(member_id)
        if member:
            self._pulse.see(member_id, str(member.beat))
        return member

    def _nobody_came(self) -> str:
        present, (fewest, most) = self._present(), self._rules.hosts
        within = f"within {self._rules.join_timeout:g} s"
        if len(present) < fewest:
            names = ", ".join(m.host for m in present)
            return (
                f"Only {len(present)} of {fewest} hosts came to the rendezvous {self._board.folder} "
                f"{within} ({names}): start the others with the same --rendezvous, or ask for fewer with --nnodes."
            )
        if len(present) < most:
            return refusal(sum(m.slots for m in present), self._rules.smallest, self._rules.legal)
        return f"No round began at the rendezvous {self._board.folder} {within}: look at the launchers of the others."


def _sweep(board: Board, me: Member) -> None:
    """Take down the signs of launchers of this machine that are dead: no need to wait until they look stale."""
    for member_id in board.members():
        member = board.member(member_id)
        pid = member_id.rsplit("-", 2)[1]
        if member and member.machine == me.machine and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            board.leave(member_id)
