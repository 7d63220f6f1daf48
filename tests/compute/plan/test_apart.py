"""Calls in processes of their own come back by number, whatever becomes of them, and end with all they have started."""

import os
import time

import pytest

from liaoyuan.compute.plan.program.apart import apart, apart_each, as_they_come
from liaoyuan.errors import LiaoyuanError


def strange(number: int) -> int:
    if number == 1:
        raise LiaoyuanError("not this one")
    if number == 2:
        raise ValueError("a mistake")
    if number == 3:
        os._exit(7)
    return abs(number)


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_each_comes_with_its_number(at_once: int) -> None:
    calls = [(number,) for number in (-3, 4, -5, 6, -7)]
    assert sorted(as_they_come(abs, calls, at_once)) == [(0, 3), (1, 4), (2, 5), (3, 6), (4, 7)]


def test_what_goes_wrong_is_told_apart_and_the_others_go_on() -> None:
    found = dict(as_they_come(strange, [(number,) for number in range(5)], 2))
    assert (found[0], found[4]) == (0, 4)
    assert isinstance(found[1], LiaoyuanError) and str(found[1]) == "not this one"
    assert isinstance(found[2], RuntimeError) and "ValueError: a mistake" in str(found[2])
    assert isinstance(found[3], LiaoyuanError) and "exit code 7" in str(found[3])
    with pytest.raises(LiaoyuanError, match="not this one"):
        apart_each(strange, [(0,), (1,)])
    with pytest.raises(RuntimeError, match="a mistake"):
        apart(strange, 2)


def test_a_call_may_make_calls_of_its_own() -> None:
    assert apart(apart, abs, -4) == 4


def nest(pipe: int) -> None:
    apart(linger, pipe)


def linger(pipe: int) -> None:
    os.write(pipe, f"{os.getpid()}\n".encode())
    time.sleep(600)


def test_who_no_longer_waits_ends_what_calls_have_started() -> None:
    """The first call is done while the second waits for one of its own: both of those end with the iterator."""
    read, write = os.pipe()
    waiting = as_they_come(lambda which: nest(write) if which else None, [(1,), (0,)], 2)
    assert next(waiting) == (1, None)
    inner = int(os.read(read, 20))
    waiting.close()  # type: ignore[attr-defined]
    for _ in range(500):
        try:
            os.kill(inner, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("a process that nobody waits for goes on")
