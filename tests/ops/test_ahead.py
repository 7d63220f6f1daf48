"""Kernels compiled ahead: each is tried in another process, and what has none is not told."""

import pytest

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
