"""The algorithms of tuning as pure functions of log-probabilities, rewards and masks."""

import torch
from torch import Tensor


def sft_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the weighted tokens: log_probs and weights fp32 [N] -> scalar."""
    return -(weights * log_probs).sum() / weights.sum().clamp(min=1e-9)


def group_advantages(rewards: Tensor, normalise: bool = True) -> Tensor:
    """Return each sample's advantage over its group: rewards [P, G] -> [P, G], zero for a group of equal rewards.

    A = (r - mean(r)) / std(r), GRPO (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2); without the division it is
    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, sec. 3.2), which gives hard and easy problems their own weight.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if not normalise:
        return centred
    deviation = rewards.std(1, keepdim=True, correction=0)
    return torch.where(deviation > 0, centred / deviation.clamp(min=1e-6), 0.0)


def has_signal(rewards: Tensor) -> Tensor:
    """Return which groups teach something, bool [P]: not all of a group's rewards are equal.

    Dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, sec. 3.2) without drawing again.
    """
    return rewards.max(1).values > rewards.min(1).values


def policy_gradient_loss(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """Return the clipped policy-gradient loss, summed over the masked tokens; all arguments fp32 [N].

    -sum min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(log_probs - rollout_log_probs): PPO's
    surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7) with DAPO's wider upper clip and token-level sum
    (arXiv 2503.14476, eq. 8). The caller divides by the number of tokens of the whole update.
    """
    ratio = (log_probs - rollout_log_probs).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum()
