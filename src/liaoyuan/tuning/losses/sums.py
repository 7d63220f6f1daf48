"""Sums over the documents of a packed batch, and back to its tokens."""

import torch
from torch import Tensor


def sums(x: Tensor, boundaries: Tensor) -> Tensor:
    """Return the sum of each document's values: x [N], boundaries int [M + 1] from 0 to N -> [M].

    Each is added up from its first token on, so its bits do not depend on what it is packed with.
    """
    total: Tensor = torch.segment_reduce(x, "sum", lengths=boundaries.diff().long(), unsafe=True, initial=0.0)
    return total


def spread(values: Tensor, boundaries: Tensor) -> Tensor:
    """Return for each token its document's value: values [M] -> [N]."""
    return values.repeat_interleave(boundaries.diff().long())
