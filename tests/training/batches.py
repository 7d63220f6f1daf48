"""Batches of invented text for tests: a function of the step alone, as those of `liaoyuan.data` are."""

from collections.abc import Callable

import torch

from liaoyuan.data import Batch
from liaoyuan.models import ModelConfig, packed_context

LENGTHS = (24, 16, 8)


def invented_batch(vocab_size: int, seed: int, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Return a batch of documents of these lengths; the first third of the targets is not learned."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    tokens = torch.randint(vocab_size, (size,), generator=generator)
    positions, context = packed_context(lengths)
    weights = (torch.arange(size) >= size // 3).float()
    targets = (tokens * 7 + 3) % vocab_size  # can be learned
    return Batch(tokens, positions, targets, weights, context.boundaries)


def invented_batches(config: ModelConfig, microbatches: int = 1) -> Callable[[int], list[Batch]]:
    """Return step -> its microbatches."""

    def batches(step: int) -> list[Batch]:
        return [invented_batch(config.vocab_size, 100 * step + part) for part in range(microbatches)]

    return batches
