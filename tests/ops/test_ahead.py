"""Kernels compiled ahead: each is tried in another process, and what has none is not told."""

import os

import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import ahead
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.rundir import Progress


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["decoder_layer", "swiglu"]), ("meta", [])])
def test_kernels_are_tried_in_processes_of_their_own(
    device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "OPERATORS", {name: OPERATORS[name] for name in ("swiglu", "decoder_layer")})
    told: list[Progress] = []
    assert ahead.compile_ahead(device, told.append) == expected
    assert [(one.done, one.total) for one in told] == [(1, 2), (2, 2)]


def test_a_process_that_is_killed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "OPERATORS", {"swiglu": OPERATORS["swiglu"]})
    monkeypatch.setattr(ahead, "_has_kernel", _killed)
    with pytest.raises(LiaoyuanError, match="was killed, as a rule for want of memory"):
        ahead.compile_ahead("cpu")


def _killed(*_: object) -> None:
    os._exit(9)
