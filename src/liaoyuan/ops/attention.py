"""Causal attention over packed documents (training, scoring, whole-prompt prefill)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * q k^T) v where a token sees itself and what precedes it in its own document.

    Args:
        query: [N, Hq, D]; key, value: [N, Hk, D], Hk divides Hq, query head h reads key head h // (Hq / Hk).
        boundaries: int32 [M + 1], rising from 0 to N: document m is rows boundaries[m] to boundaries[m + 1].
            Repeated entries at the end (empty documents) fill the tensor to its fixed size.
        scale: factor of the scores, 1 / sqrt(D) as a rule.

    Returns:
        [N, Hq, D] in the dtype of query.
    """
    rows = torch.arange(query.shape[0], device=query.device)
    document = torch.searchsorted(boundaries[1:].long(), rows, right=True)
    mask = (document[:, None] == document[None, :]) & (rows[:, None] >= rows[None, :])
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
