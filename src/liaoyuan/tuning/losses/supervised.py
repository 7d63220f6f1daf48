"""The loss of supervised fine-tuning."""

from torch import Tensor


def sft_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the weighted tokens: log_probs and weights fp32 [N] -> scalar."""
    return -(weights * log_probs).sum() / weights.sum().clamp(min=1e-9)
