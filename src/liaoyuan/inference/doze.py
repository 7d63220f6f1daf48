"""Sleep of an engine that nobody has asked for a while: it gives its memory back, and wakes for the next request."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from liaoyuan.inference.engine import Engine

HELD_SECONDS = 0.1  # between two looks at whether it is still held


class Doze:
    """When an engine goes to sleep by itself; for the engine's thread alone."""

    def __init__(self, engine: Engine, after: float | None, weights: Path | None) -> None:
        """See `EngineThread`."""
        self._engine, self._after, self._weights = engine, after, weights
        self._active, self._slept = time.monotonic(), False
        self._holders = 0
        self._read = engine.updates  # at so many updates it has the weights of the folder

    @property
    def dozing(self) -> bool:
        """Whether it sleeps by itself; whoever was put to sleep by somebody is not woken by a request."""
        return self._slept and self._engine.state == "asleep"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep it from going to sleep until the block ends; for the thread of whoever asks."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1

    def patience(self) -> float | None:
        """Return the seconds until it sleeps if nothing comes; None: it will not."""
        if self._after is None or self._engine.state != "ready":
            return None
        return max(HELD_SECONDS if self._holders else 0.0, self._active + self._after - time.monotonic())

    def look(self) -> None:
        """Go to sleep if it is time. Weights that were changed since they were read are kept: the folder has others."""
        if self._engine.has_work:
            self._active = time.monotonic()
        elif self.patience() == 0.0:
            self._engine.sleep(without_weights=self._weights is not None and self._engine.updates == self._read)
            self._slept = True

    def end(self) -> None:
        """Wake if it sleeps by itself, and let it stay awake for a while.

        Raises:
            LiaoyuanError: there is not enough memory, or the folder of the weights is gone.
        """
        self._active = time.monotonic()
        if not self._slept:
            return
        if self._engine.state == "asleep":
            self._engine.wake()
        if not self._engine.has_weights and self._weights is not None:
            self._engine.update_weights(self._weights, version=self._engine.version)
            self._read = self._engine.updates
        if self._engine.state == "paused":
            self._engine.resume()
        self._slept = False
