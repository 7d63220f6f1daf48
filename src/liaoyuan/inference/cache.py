"""The memory of the paged key-value cache, and the attention context that reads and writes it.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180), sec. 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from liaoyuan.models import ModelConfig, Pattern
from liaoyuan.ops import Pages, paged_attention, write_cache


class KeyValueCache:
    """The memory: `keys[layer]` [num_blocks, block_size, Hk, D] and `values[layer]` [..., Dv] in the model's dtype.

    A model with further layers has one layer more: the first of them guesses.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, heads: int | None = None
    ) -> None:
        """heads: how many of the key-value heads are computed in this process, if not all."""

        def pages(dim: int) -> list[Tensor]:
            # Zeros, not empty: fresh zero pages cost no memory until they are written.
            shape = (num_blocks, block_size, heads or config.num_key_value_heads, dim)
            return [torch.zeros(shape, dtype=config.torch_dtype, device=device) for _ in range(cached_layers(config))]

        self.keys, self.values = pages(config.head_dim), pages(config.value_head_dim)

    def layers(self) -> list[Tensor]:
        """Return the keys of all layers, then the values."""
        return [*self.keys, *self.values]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy blocks, int64 [C] each; a block is never both a source and a target."""
        for layer in self.layers():
            layer.index_copy_(0, target, layer.index_select(0, source))


def cached_layers(config: ModelConfig) -> int:
    """Return how many layers have keys and values in a cache."""
    return config.num_hidden_layers + bool(config.further_layers)


@dataclass(frozen=True)
class PagedContext:
    """Attention of one step's tokens over the cache; see `ops.paged_attention` for the tensors.

    slots: int64 [N], the place of each new token in the cache (block * block_size + offset).
    """

    cache: KeyValueCache
    slots: Tensor
    block_tables: Tensor
    query_starts: Tensor
    lengths: Tensor

    def pages(self, layer: int) -> Pages:
        cache = self.cache
        return Pages(
            cache.keys[layer], cache.values[layer], self.slots, self.block_tables, self.query_starts, self.lengths
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        write_cache(key, value, keys, values, self.slots)
        places = (self.block_tables, self.query_starts, self.lengths)
        return paged_attention(query, keys, values, *places, pattern.scale, pattern.window, pattern.sinks)
