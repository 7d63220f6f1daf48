"""The algorithms of tuning as pure functions of log-probabilities, rewards and masks."""

import torch
from torch import Tensor


def sft_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the weighted tokens: log_probs and weights fp32 [N] -> scalar."""
    return -(weights * log_probs).sum() / weights.sum().clamp(min=1e-9)


def group_advantages(rewards: Tensor, normalise: bool = True, chosen: Tensor | None = None) -> Tensor:
    """Return each sample's advantage over its group: rewards [P, G] -> [P, G], zero for a group of equal rewards.

    chosen, bool [P, G], as many in each group: only these samples count; the others' advantages mean nothing.

    A = (r - mean(r)) / std(r), GRPO (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2); without the division it is
    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, sec. 3.2), which gives hard and easy problems their own weight.
    """
    counted = rewards if chosen is None else rewards[chosen].view(len(rewards), -1)
    centred = rewards - counted.mean(1, keepdim=True)
    if not normalise:
        return centred
    deviation = counted.std(1, keepdim=True, correction=0)
    return torch.where(deviation > 0, centred / deviation.clamp(min=1e-6), 0.0)


def has_signal(rewards: Tensor) -> Tensor:
    """Return which groups teach something, bool [P]: not all of a group's rewards are equal.

    Dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, sec. 3.2) without drawing again.
    """
    return rewards.max(1).values > rewards.min(1).values


def most_different(rewards: Tensor, count: int) -> Tensor:
    """Return which `count` samples of each group differ most in reward: rewards [P, G] -> bool [P, G].

    The subset of largest variance consists of the best and the worst ones (PODS: Xu et al. 2025, arXiv 2504.13818,
    theorem 1); among equals the first count as better, the last as worse. Each group keeps samples of both kinds if
    it has them.
    """
    order = rewards.argsort(dim=1, descending=True, stable=True)
    ranked = rewards.gather(1, order)
    best, variance = torch.zeros_like(rewards, dtype=torch.bool), torch.full_like(rewards[:, :1], -1.0)
    for high in range(count + 1):
        mask = torch.zeros_like(best)
        mask[:, :high] = True
        mask[:, rewards.shape[1] - (count - high) :] = True
        found = ranked.masked_select(mask).view(-1, count).var(1, correction=0)[:, None]
        best = torch.where(found > variance, mask, best)
        variance = torch.maximum(found, variance)
    return torch.zeros_like(best).scatter(1, order, best)


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
