"""Log-probability of given tokens under the output head, without keeping the logits."""

import torch
from torch import Tensor


def token_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(hidden @ weight^T)[target]: every loss of the project is a function of it.

    Args:
        hidden: [N, H]; weight: [V, H], same dtype; targets: int64 [N], each in 0 .. V - 1.

    Returns:
        fp32 [N]; the softmax is computed in fp32.
    """
    logits = (hidden @ weight.t()).float()
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    return chosen - torch.logsumexp(logits, -1)
