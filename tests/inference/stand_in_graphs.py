"""Device graphs without a device: what is captured is called again, into the same memory."""

from collections.abc import Callable

import pytest
from torch import Tensor

from liaoyuan.inference import graphs


def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let engines on a CPU capture as they do on a device; return how often they have captured and replayed."""
    counts = {"captured": 0, "replayed": 0}

    def captured(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        for _ in range(graphs.WARM_UP):
            function()
        result = function().clone()
        counts["captured"] += 1

        def replay() -> None:
            counts["replayed"] += 1
            result.copy_(function())

        return result, replay

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "ON_CPU", graphs.ON_DEVICE)
    return counts
