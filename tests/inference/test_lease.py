"""Promises of leases: a block is held until the reader has it, is gone or is silent, and then no longer, in any order
of what may happen on either side.
"""

import itertools

import numpy as np
import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.blocks import BlockPool
from liaoyuan.inference.disaggregation.lease import LeaseEnded, Leases

BLOCKS, DURATION = 3, 10.0


def blocks(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


class Sides:
    """A prefill side with a pool of blocks, a decode side, and two streams between them; time is a number."""

    def __init__(self) -> None:
        self.pool, self.now = BlockPool(BLOCKS + 1), 0.0
        self.leases = Leases(DURATION, self.pool.give)
        self.leases.grant("a", 0, self.now)
        self.sent, self.received, self.acknowledged = 0, 0, 0
        self.to_reader: list[int] = []
        self.to_lender: list[int] = []
        self.lender_lives = self.reader_lives = True

    def lend(self) -> None:
        """The prefill side has computed a block: it holds it, and sends it."""
        if not self.lender_lives or self.sent == BLOCKS or self.pool.free == 0:
            return
        taken = self.pool.take(1)
        try:
            self.leases.add("a", taken)
        except LeaseEnded:
            self.pool.give(taken)
            return
        self.to_reader.append(self.sent)
        self.sent += 1

    def read(self) -> None:
        """The decode side reads what is on the stream, and says so."""
        if self.reader_lives and self.to_reader:
            assert self.to_reader.pop(0) == self.received, "out of order"
            self.received += 1
            self.to_lender.append(self.received)

    def hear(self) -> None:
        """The prefill side reads what is acknowledged; a stream that is closed says so after its last word."""
        if not self.lender_lives:
            return
        if self.to_lender:
            try:
                self.leases.acknowledge("a", got := self.to_lender.pop(0), self.now)
                self.acknowledged = got
            except LeaseEnded:
                pass
        elif not self.reader_lives:
            self.leases.end("a")

    def kill_reader(self) -> None:
        self.reader_lives = False

    def kill_lender(self) -> None:
        """Its memory goes with it; the reader finds the stream closed."""
        self.lender_lives = False

    def wait(self) -> None:
        self.now += DURATION * 0.6
        if self.lender_lives:
            self.leases.expire(self.now)

    def check(self) -> None:
        self.pool.check(self.leases.held())
        if len(self.leases):
            assert len(self.leases.held()) == self.sent - self.acknowledged
        else:
            assert self.pool.free == self.pool.size


ACTIONS = ("lend", "read", "hear", "wait", "kill_reader", "kill_lender")


def test_every_order_of_events_and_deaths_leaves_no_block_behind() -> None:
    for order in itertools.product(ACTIONS, repeat=6):
        sides = Sides()
        for action in order:
            getattr(sides, action)()
            sides.check()
        # Nothing more happens: the reader closes its stream, or stays silent until the lease is over.
        sides.wait()
        sides.wait()
        sides.check()
        assert not len(sides.leases) or not sides.lender_lives
        assert sides.received >= sides.acknowledged


def test_who_reads_steadily_gets_all_however_long_it_takes() -> None:
    sides = Sides()
    for _ in range(BLOCKS):
        for action in ("lend", "wait", "read", "hear"):
            getattr(sides, action)()
            sides.check()
    assert sides.received == sides.acknowledged == BLOCKS
    assert len(sides.leases) == 1 and sides.pool.free == sides.pool.size


def test_a_lease_that_is_over_gives_nothing_and_takes_nothing() -> None:
    given: list[int] = []
    leases = Leases(DURATION, lambda ended: given.extend(ended.tolist()))
    leases.grant("a", 2, 0.0)
    leases.add("a", blocks(7, 8, 9))
    leases.acknowledge("a", 3, 5.0)
    assert given == [7] and leases.held().tolist() == [8, 9]
    leases.acknowledge("a", None, 9.0)
    assert leases.expire(18.9) == [] and leases.expire(19.0) == ["a"]
    assert given == [7, 8, 9] and not len(leases.held())
    for late in (lambda: leases.add("a", blocks(1)), lambda: leases.acknowledge("a", 4, 20.0)):
        with pytest.raises(LeaseEnded, match="The lease 'a' is over"):
            late()
    assert leases.end("a") is False and given == [7, 8, 9]


def test_a_reader_cannot_have_what_was_not_sent() -> None:
    leases = Leases(DURATION, lambda ended: None)
    leases.grant("a", 4, 0.0)
    leases.add("a", blocks(1, 2))
    for got in (3, 7, -1):
        with pytest.raises(LiaoyuanError, match="it can have 4 to 6"):
            leases.acknowledge("a", got, 1.0)
    assert leases.held().tolist() == [1, 2]
    with pytest.raises(LiaoyuanError, match="already a lease 'a'"):
        leases.grant("a", 0, 1.0)
