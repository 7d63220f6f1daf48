"""Where a model's weights and its cache lie: in this process, or, through `mirror.Leader`, in several."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from liaoyuan.inference.adapter_stacks import Stacks
from liaoyuan.inference.cache import KeyValueCache
from liaoyuan.inference.further_streams import FurtherStreams
from liaoyuan.inference.weights import (
    Weights,
    checked_weights,
    copy_weights,
    drop_weights,
    take_weights,
    weights_checksum,
)
from liaoyuan.models import Decoder


class Memory(Protocol):
    """What an engine asks of it, beside calling the model."""

    def describe(self) -> str:
        """Return how the model lies over processes, in words."""
        ...

    def new_cache(self, num_blocks: int, block_size: int) -> KeyValueCache:
        """Return a cache with nothing in it."""
        ...

    def adapter_stacks(self) -> Stacks:
        """Return where adapters of the model go."""
        ...

    def further_streams(self, slots: int) -> FurtherStreams:
        """Return the streams of a model with a further layer."""
        ...

    def checked(self, weights: Weights) -> Mapping[str, Tensor]:
        """Return new weights for `copy_weights`; see `weights.checked_weights`."""
        ...

    def copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy checked weights into the model, in place."""
        ...

    def checksum(self) -> str:
        """Return the checksum of the weights; see `weights.weights_checksum`."""
        ...

    def drop_weights(self) -> None:
        """Give the memory of the weights back."""
        ...

    def take_memory(self) -> None:
        """Take the memory of dropped weights again; what is in it is not known."""
        ...

    def before_step(self) -> None:
        """Do what is to be done between two steps."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Return what the engine's statistics should say of it."""
        ...


class OwnMemory:
    """The memory of one process."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._dropped: dict[str, torch.Size] = {}  # weights whose memory was given back

    def describe(self) -> str:
        return "one process"

    def new_cache(self, num_blocks: int, block_size: int) -> KeyValueCache:
        model = self._model
        return KeyValueCache(model.config, num_blocks, block_size, model.embed_tokens.weight.device)

    def adapter_stacks(self) -> Stacks:
        return Stacks(self._model)

    def further_streams(self, slots: int) -> FurtherStreams:
        return FurtherStreams(self._model, slots)

    def checked(self, weights: Weights) -> Mapping[str, Tensor]:
        return checked_weights(self._model, weights)

    def copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        copy_weights(self._model, weights)

    def checksum(self) -> str:
        return weights_checksum(self._model)

    def drop_weights(self) -> None:
        self._dropped = drop_weights(self._model)

    def take_memory(self) -> None:
        take_weights(self._model, self._dropped)
        self._dropped = {}

    def before_step(self) -> None:
        pass

    def statistics(self) -> dict[str, Any]:
        return {}
