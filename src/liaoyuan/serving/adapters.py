"""The adapters that requests may name, and which one a request has named."""

from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from liaoyuan.inference import Loaded

# Of one HTTP request, not of the process: tasks and threads that work for it inherit it. "": the model itself.
ADAPTER: ContextVar[str] = ContextVar("adapter", default="")


class Known(Protocol):
    """Whoever knows which adapters are loaded: `inference.Adapters`, or who serves for several engines."""

    def loaded(self) -> list[Loaded]:
        """Return those that a request may name now."""
        ...


@dataclass(frozen=True)
class Shelf:
    """The adapters of what serves, and the folder from inside which clients may load others (None: they may not)."""

    adapters: Known | None = None
    folder: Path | None = None

    def loaded(self) -> list[Loaded]:
        """Return those that a request may name now."""
        return [] if self.adapters is None else self.adapters.loaded()


def adapter_cards(model: dict[str, Any], shelf: Shelf) -> list[dict[str, Any]]:
    """Return what `/v1/models` says of each adapter, given what it says of the model."""
    return [
        {
            **model,
            "id": adapter.name,
            "display_name": adapter.name,
            "parent": model["id"],
            "root": adapter.folder,
            "lora_rank": adapter.rank,
        }
        for adapter in shelf.loaded()
        if adapter.name != model["id"]
    ]
