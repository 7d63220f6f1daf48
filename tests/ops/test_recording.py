"""Calls of operators that are recorded and made again: what a function would give if it were called again."""

import threading

import pytest
import torch
from torch import Tensor

from liaoyuan.ops.kernels import has_native
from liaoyuan.ops.recording import Recording

pytestmark = [
    pytest.mark.skipif(not has_native(), reason="there is no native library here"),
    pytest.mark.filterwarnings("error"),
]


@pytest.fixture(autouse=True)
def as_in_an_engine():
    with torch.inference_mode():
        yield


def step(state: Tensor, weight: Tensor):
    """Work that has results of one part and of two, lists, views, what is written in place, and numbers."""

    def work() -> tuple[Tensor, ...]:
        x = (state @ weight).relu() + 1
        first = x[0]
        joined = torch.cat([first, state[0], x[1], x[2]])[None].flatten()
        top, places = joined.topk(3)
        state.mul_(0.5).add_(top.sum())
        return joined, places, first.clone()

    return work


def test_calls_that_are_made_again_give_what_the_function_gives() -> None:
    weight, start = torch.randn(4, 4), torch.randn(3, 4)
    state, other = start.clone(), start.clone()
    recording, function = Recording(step(state, weight)), step(other, weight)
    for _ in range(4):
        for one, expected in zip(recording(), function(), strict=True):
            assert torch.equal(one, expected)
        assert torch.equal(state, other)
    assert recording.is_recorded


def test_other_values_in_the_tensors_that_stay_are_read() -> None:
    state, weight = torch.ones(3, 4), torch.eye(4)
    recording = Recording(step(state, weight))
    recording()
    state.copy_(torch.arange(12.0).view(3, 4))
    weight.mul_(3)
    expected = step(state.clone(), weight)()
    assert all(torch.equal(one, other) for one, other in zip(recording(), expected, strict=True))


def test_results_of_earlier_calls_stay_as_they_are() -> None:
    recording = Recording(step(torch.randn(3, 4), torch.randn(4, 4)))
    found = [recording() for _ in range(3)]
    kept = [one.clone() for each in found for one in each]
    recording()
    assert all(torch.equal(one, other) for one, other in zip(sum(found, ()), kept, strict=True))


def test_a_function_that_decides_by_a_number_of_an_operator_is_called_each_time() -> None:
    state, calls = torch.zeros(2), []

    def counting() -> tuple[Tensor, ...]:
        calls.append(state.sum().item())
        state.add_(1)
        return (state * calls[-1],)

    recording = Recording(counting)
    found = [recording()[0].tolist() for _ in range(3)]
    assert calls == [0.0, 2.0, 4.0]
    assert found == [[0.0, 0.0], [4.0, 4.0], [12.0, 12.0]]
    assert not recording.is_recorded


def test_a_result_that_no_call_made_cannot_be_recorded() -> None:
    state = torch.zeros(2)
    recording = Recording(lambda: (state.add_(1),))
    assert [recording()[0][0].item() for _ in range(3)] == [1.0, 2.0, 3.0]
    assert not recording.is_recorded


def test_a_function_that_fails_is_recorded_at_its_next_call() -> None:
    state, fails = torch.zeros(2), [True]

    def work() -> tuple[Tensor, ...]:
        if fails.pop() if fails else False:
            torch.embedding(torch.ones(1, 1), torch.tensor([7]))  # raises
        return (state + 1,)

    recording = Recording(work)
    with pytest.raises(IndexError):
        recording()
    assert not recording.is_recorded
    assert [recording()[0].tolist() for _ in range(2)] == [[1.0, 1.0]] * 2
    assert recording.is_recorded


def test_a_call_that_failed_inside_is_not_made_again() -> None:
    def work() -> tuple[Tensor, ...]:
        try:
            found = torch.embedding(torch.ones(1, 1), torch.tensor([7]))
        except IndexError:
            found = torch.full((1, 1), 5.0)
        return (found * 2,)

    recording = Recording(work)
    assert [recording()[0].item() for _ in range(3)] == [10.0] * 3
    assert recording.is_recorded


def test_an_error_of_a_call_that_is_made_again_is_raised() -> None:
    place = torch.tensor([0])
    recording = Recording(lambda: (torch.embedding(torch.ones(2, 1), place).clone(),))
    recording()
    place.fill_(9)
    with pytest.raises(IndexError):
        recording()
    place.fill_(1)
    assert recording()[0].item() == 1.0


def test_threads_record_their_own_calls() -> None:
    """Calls that another thread makes meanwhile are none of it."""
    went, may_end = threading.Event(), threading.Event()

    def disturb() -> None:
        with torch.inference_mode():
            while not may_end.is_set():
                torch.ones(3).sum().item()  # could not be recorded
                went.set()

    other = threading.Thread(target=disturb)
    other.start()
    try:
        went.wait()
        recording = Recording(step(torch.randn(3, 4), torch.randn(4, 4)))
        recording()
        assert recording.is_recorded
    finally:
        may_end.set()
        other.join()


def test_what_is_forgotten_gives_its_tensors_back() -> None:
    recording = Recording(lambda: (torch.ones(4) * 2,))
    recording()
    number = recording._number
    torch.ops.liaoyuan_native.replay(number)
    del recording
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.liaoyuan_native.replay(number)
