"""Split the merged query-key-value projection, normalise query and key per head (optional), rotate them.

Rotary embedding: Su et al. 2021 (arXiv 2104.09864), in the half-split layout of Hugging Face Llama.
QK-norm: Henry et al. 2020 (arXiv 2010.04245), as RMSNorm over the head dimension (Qwen3).
"""

import torch
from torch import Tensor

from liaoyuan.ops.norm import rms_norm


def split_rotary(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    num_key_value_heads: int,
    head_dim: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous query [N, Hq, D], key [N, Hk, D], value [N, Hk, D].

    Args:
        qkv: [N, Hk * (G + 2) * D]; for each key-value head its G query heads, its key, its value.
        cosine, sine: [N, D / 2] fp32, the angles of each token's position.
        query_norm, key_norm: [D] weights of QK-norm, or None.
    """
    groups = qkv.view(qkv.shape[0], num_key_value_heads, -1, head_dim)
    query = groups[:, :, :-2].reshape(qkv.shape[0], -1, head_dim)
    key, value = groups[:, :, -2], groups[:, :, -1].contiguous()
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm, eps), rms_norm(key, key_norm, eps)
    return _rotate(query, cosine, sine), _rotate(key, cosine, sine), value


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
