"""Streams wait for each other as they must: closed forms of small steps, and what more bandwidth and speed may do."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.compute.plan.machine.fabric import Transfer
from liaoyuan.compute.plan.program.ops import COMPUTE, Op
from liaoyuan.compute.plan.program.work import Work, stream
from liaoyuan.compute.plan.step.prices import Prices
from liaoyuan.compute.plan.step.timeline import LAUNCH, Timeline, play, shares
from liaoyuan.parallel.traffic import Collective

LINK = ("link",)


@dataclass
class Given(Prices):
    """Prices that are written in the ops: seconds of work in `traffic`, those of a message in `bytes`."""

    launch: float = 0.0
    asking: float = 0.0
    contention: float = 1.0
    streams: bool = True
    latency: float = 0.0
    bandwidth: float = 1.0
    speed: float = 1.0
    carry: float = 0.0

    def work(self, work: Work) -> float:
        return work.traffic / self.speed

    def carried(self, message: Collective) -> float:
        return self.carry * message.bytes

    def message(self, message: Collective) -> Transfer:
        return Transfer(self.latency, tuple((level, message.bytes / self.bandwidth) for level in message.kind.split()))


def compute(seconds: float, *after: int, holds: bool = False) -> Op:
    return Op("work", COMPUTE, stream(seconds), None, -1, after, holds)


def send(seconds: int, gate: int, group: str = "tp", levels: str = "link", after: tuple[int, ...] = ()) -> Op:
    return Op("message", group, None, Collective(group, levels, (0, 1), seconds), gate, after, False)


def played(*ops: Op, **prices: float | bool) -> Timeline:
    return play(ops, Given(**prices))[-1]  # type: ignore[arg-type]


def test_a_message_hides_behind_what_does_not_need_it() -> None:
    line = played(compute(1), send(3, 0), compute(5), compute(1, 1))
    assert line.seconds == pytest.approx(7) and line.exposed == {}
    assert line.busy == pytest.approx({COMPUTE: 7, "tp": 3})


def test_what_is_not_hidden_is_exposed_by_its_axis() -> None:
    line = played(compute(1), send(3, 0), compute(1), compute(1, 1), latency=0.5)
    assert line.seconds == pytest.approx(5.5)
    assert line.exposed == pytest.approx({"tp": 2.5})


def test_a_message_sets_out_when_what_was_asked_before_is_computed() -> None:
    line = played(compute(2), send(1, 0), send(1, 0, "ep"), compute(1, 1, 2))
    assert line.seconds == pytest.approx(5)  # both share the link: 2 s


def test_messages_of_a_group_go_one_after_another_and_those_of_two_share() -> None:
    one = played(compute(0), send(1, 0), send(3, 0), compute(0, 1, 2))
    two = played(compute(0), send(1, 0), send(3, 0, "ep"), compute(0, 1, 2))
    assert one.seconds == pytest.approx(4) and two.seconds == pytest.approx(4)
    assert one.busy["tp"] == pytest.approx(4)
    assert two.busy == pytest.approx({COMPUTE: 0, "tp": 2, "ep": 4})


def test_messages_over_different_levels_do_not_meet() -> None:
    line = played(compute(0), send(3, 0), send(3, 0, "ep", "rail"), compute(0, 1, 2))
    assert line.seconds == pytest.approx(3)


def test_computing_is_slower_while_messages_travel() -> None:
    line = played(compute(0), send(3, 0), compute(4), contention=1.5)
    assert line.seconds == pytest.approx(3 + 2)  # 2 s of work in the 3 s of the message, then 2 s
    assert line.busy[COMPUTE] == pytest.approx(5)


def test_a_step_of_small_work_is_bound_by_its_host() -> None:
    ops = [compute(0.25) for _ in range(10)]
    line = played(*ops, launch=1.0)
    assert line.seconds == pytest.approx(10.25)
    assert line.exposed == pytest.approx({LAUNCH: 7.75})


def test_the_host_waits_where_a_number_is_read() -> None:
    free = played(compute(5), compute(1), compute(1), launch=1.0)
    held = played(compute(5), compute(1, holds=True), compute(1), launch=1.0)
    assert free.seconds == pytest.approx(8) and held.seconds == pytest.approx(9)


def test_a_device_without_streams_asks_itself() -> None:
    line = played(compute(1), send(2, 0), compute(1), compute(1, 1), launch=0.5, streams=False)
    # 0.5 + 1, asks (0.5): the message goes from 2.0 on, 0.5 + 1 until 3.5; it is there at 4.0
    assert line.seconds == pytest.approx(5.5)
    assert line.exposed == pytest.approx({LAUNCH: 2.0, "tp": 0.5})


def test_a_device_without_streams_computes_for_what_it_sends() -> None:
    """Gloo's call itself takes a part of a millisecond of the thread that computes."""
    ops = [compute(1), *(send(1, 0) for _ in range(4)), compute(1)]
    line = played(*ops, streams=False, launch=0.25, asking=0.5)
    assert line.exposed[LAUNCH] == pytest.approx(0.25 + 4 * 0.5 + 0.25)
    assert played(*ops, streams=True, launch=0.25, asking=0.5).exposed[LAUNCH] < 1.5


def test_computing_waits_for_what_carries_a_message_but_not_twice() -> None:
    """Gloo's threads take the core from the thread that computes; whoever waits for the message loses nothing more."""
    hidden = played(compute(1), send(4, 0), compute(8), compute(1, 1), streams=False, asking=0.5, carry=0.5)
    assert hidden.seconds == pytest.approx(12) and hidden.exposed == pytest.approx({LAUNCH: 0.5, "tp": 1.5})
    waited = played(compute(1), send(4, 0), compute(1, 1), streams=False, asking=0.5, carry=0.5)
    assert waited.seconds == pytest.approx(6)
    cheap = played(compute(1), send(4, 0), compute(8), compute(1, 1), streams=False, asking=0.5, carry=0.01)
    assert cheap.seconds == pytest.approx(10.5)


def test_what_is_still_under_way_at_the_end_belongs_to_the_step() -> None:
    line = played(compute(1), send(2, 0))
    assert line.seconds == pytest.approx(3) and line.exposed == pytest.approx({"tp": 2})


LOADS = st.lists(
    st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 10), min_size=1).map(
        lambda one: tuple(sorted(one.items()))
    ),
    min_size=1,
    max_size=5,
).map(tuple)


@given(LOADS)
@settings(max_examples=200, deadline=None)
def test_levels_are_shared_max_min_fairly(loads: tuple[tuple[tuple[str, float], ...], ...]) -> None:
    rates = shares(loads)
    used = {
        level: sum(r * load for r, one in zip(rates, loads, strict=True) for at, load in one if at == level)
        for level in "abc"
    }
    assert all(value <= 1 + 1e-9 for value in used.values())
    share = [rate * max(load for _, load in one) for rate, one in zip(rates, loads, strict=True)]
    for number, one in enumerate(loads):  # each has a full level where nobody has more than it
        others = [[share[n] for n, other in enumerate(loads) if level in dict(other)] for level, _ in one]
        full = [used[level] >= 1 - 1e-9 for level, _ in one]
        assert any(is_full and share[number] >= max(rest) - 1e-9 for is_full, rest in zip(full, others, strict=True))


@st.composite
def steps(draw: st.DrawFn, levels: tuple[str, ...]) -> list[Op]:
    """Return a step: work, messages of two groups, and work that waits for some of them."""
    ops, open_messages, computed = list[Op](), list[int](), -1
    for _ in range(draw(st.integers(2, 14))):
        if draw(st.booleans()):
            awaited = tuple(n for n in open_messages if draw(st.booleans()))
            open_messages = [n for n in open_messages if n not in awaited]
            ops.append(compute(draw(st.integers(0, 8)), *awaited))
            computed = len(ops) - 1
        else:
            place = draw(st.integers(0, 1))
            ops.append(send(draw(st.integers(1, 8)), computed, ("tp", "shard")[place], levels[place]))
            open_messages.append(len(ops) - 1)
    return ops


@given(steps(("link", "rail")), st.floats(1, 8))
@settings(max_examples=150, deadline=None)
def test_where_nothing_is_shared_more_of_anything_never_hurts(ops: list[Op], more: float) -> None:
    before = played(*ops, launch=0.1, latency=0.2).seconds
    assert played(*ops, launch=0.1, latency=0.2, bandwidth=more).seconds <= before + 1e-9
    assert played(*ops, launch=0.1, latency=0.2, speed=more).seconds <= before + 1e-9
    assert played(*ops, launch=0.1 / more, latency=0.2).seconds <= before + 1e-9
    assert played(*ops, launch=0.1, latency=0.2 / more).seconds <= before + 1e-9


@given(steps(("link", "link")))
@settings(max_examples=150, deadline=None)
def test_twice_the_bandwidth_never_hurts_two_groups_on_one_link(ops: list[Op]) -> None:
    before = played(*ops, launch=0.1).seconds
    assert played(*ops, launch=0.1, bandwidth=2.0).seconds <= before + 1e-9


@given(steps(("link", "link")))
@settings(max_examples=100, deadline=None)
def test_a_step_is_no_shorter_than_any_stream_and_no_longer_than_all(ops: list[Op]) -> None:
    line = played(*ops)
    assert line.seconds >= max(line.busy.values(), default=0.0) - 1e-9
    alone = sum(op.work.traffic if op.work else op.message.bytes for op in ops)  # type: ignore[union-attr]
    assert line.seconds <= alone + 1e-9
    assert line.seconds == pytest.approx(line.busy[COMPUTE] + sum(line.exposed.values()), abs=1e-9)
