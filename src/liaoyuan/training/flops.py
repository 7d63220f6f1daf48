"""Model FLOPs of a training step, and their share of what the machine's matrix products reach.

The count is the usual one (Chowdhery et al. 2022, arXiv 2204.02311, app. B) with causal attention: a token attends
to itself and to what precedes it in its document, not to the whole sequence. Recomputation does not count.
"""

from torch import Tensor

from liaoyuan.models import ModelConfig

TRAINING = 3  # a backward pass costs two forward passes


def average_context(boundaries: Tensor) -> float:
    """Return the mean number of tokens that a token attends to; boundaries int32 [M + 1] as in `PackedContext`."""
    lengths = boundaries.diff().double()
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def training_flops(config: ModelConfig, boundaries: Tensor) -> float:
    """Return the FLOPs of one forward and backward pass over the packed documents of `boundaries`."""
    tokens = int(boundaries[-1])
    return TRAINING * tokens * config.flops_per_token(average_context(boundaries))


def utilisation(tokens_per_second: float, config: ModelConfig, gemm_rate: float, context: float = 0.0) -> float:
    """Return the model FLOPs utilisation of training: achieved FLOP/s over `gemm_rate` (measured, FLOP/s)."""
    return tokens_per_second * TRAINING * config.flops_per_token(context) / gemm_rate
