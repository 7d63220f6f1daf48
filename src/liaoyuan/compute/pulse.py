"""Who is alive, judged by change alone: a sign of life is a text that differs from the last one seen.

No time that another host wrote is ever read, so hosts whose clocks disagree by hours are judged rightly.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]  # seconds on this process's own monotonic clock


@dataclass(frozen=True)
class _Sight:
    text: str
    at: float  # when this observer saw it change, or saw it first
    changed: bool  # whether it was ever seen to change


class Pulse:
    """What one observer knows of the others' signs of life."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._sights: dict[str, _Sight] = {}

    def see(self, name: str, text: str) -> None:
        """Note what `name` shows now."""
        last = self._sights.get(name)
        if last is None or last.text != text:
            self._sights[name] = _Sight(text, self._clock(), changed=last is not None)

    def age(self, name: str) -> float:
        """Return the seconds since `name` last changed, or since it was first seen."""
        return self._clock() - self._sights[name].at

    def has_changed(self, name: str) -> bool:
        """Return whether `name` was ever seen to change: what a dead process left behind never does."""
        return self._sights[name].changed

    def forget(self, name: str) -> None:
        """Begin anew with `name`."""
        self._sights.pop(name, None)
