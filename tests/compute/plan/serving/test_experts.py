"""Where experts lie: what the placement code makes of a trace, and what chance does in small steps."""

import json
from pathlib import Path

import numpy as np
import pytest

from liaoyuan.compute.plan.serving import read_counts, spread, spreads
from liaoyuan.compute.plan.serving.experts import busiest
from liaoyuan.errors import LiaoyuanError


def trace(windows: int = 6, layers: int = 2, experts: int = 16) -> np.ndarray:
    """One expert in eight is asked for ten times as often, the same ones in all windows."""
    random = np.random.default_rng(0)
    weight = np.where(np.arange(experts) < experts // 8, 10.0, 1.0)
    return random.poisson(200 * weight, (windows, layers, experts)).astype(float)


def test_chance_alone_is_what_running_engines_show() -> None:
    """docs/expert-placement.md measured 1.21 for 96 choices over 4 processes, and 1.05 for 2,048."""
    even = (0.25,) * 4
    assert busiest(even, 96) == pytest.approx(1.21, abs=0.01)
    assert busiest(even, 2048) == pytest.approx(1.05, abs=0.01)


def test_copies_even_out_what_moving_alone_cannot() -> None:
    still, moved, copied = spreads(trace(), 8, (0, 1))
    assert still.imbalance > 3  # both busy experts lie in the first process
    assert 1.5 < moved.imbalance < still.imbalance / 1.5  # one of them is more than a process's share
    assert copied.imbalance < 1.2 and copied.moves > 0
    assert still.moves == 0
    for one in (still, moved, copied):
        assert sum(one.shares) == pytest.approx(1.0)
        assert one.shares[0] * 8 == pytest.approx(one.imbalance, rel=1e-6)
        assert one.worst >= one.imbalance


def test_an_even_trace_stays_where_it_is() -> None:
    found = spread(np.full((3, 2, 16), 50.0), 4, 2)
    assert (found.imbalance, found.moves) == (pytest.approx(1.0), 0)


def test_traces_are_read_in_both_forms(tmp_path: Path) -> None:
    counts = trace()
    np.save(tmp_path / "a.npy", counts.reshape(2, 3, 2, 16))
    lines = [json.dumps({"counts": window.tolist()}) for window in counts]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert np.array_equal(read_counts(tmp_path / "a.npy"), counts)
    assert np.array_equal(read_counts(tmp_path / "b.jsonl"), counts)
    (tmp_path / "c.jsonl").write_text('{"count": 3}\n')
    with pytest.raises(LiaoyuanError, match="no trace of routers"):
        read_counts(tmp_path / "c.jsonl")


def test_what_cannot_be_spread_is_refused() -> None:
    with pytest.raises(LiaoyuanError, match="3 processes do not divide the 16 experts"):
        spread(trace(), 3)
    with pytest.raises(LiaoyuanError, match="15 copies are more than the 14"):
        spread(trace(), 8, 15)
