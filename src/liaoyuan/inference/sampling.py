"""Sampling for a whole batch at once, with a random number per (seed, position).

The random numbers are counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), mixed by
splitmix64 (Steele et al. 2014), so that a sample never depends on the other requests in the batch.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from liaoyuan.ops import sample_tokens, sampling_settings


@dataclass(frozen=True)
class Settings:
    """The sampling parameters of R rows, numpy [R]; see `SamplingParams`. uniform: fp64 in [0, 1)."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray
    uniform: np.ndarray


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return fp64 [R] in [0, 1) that depends on (seed, position) alone; seeds uint64 [R], positions int [R]."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(12)) * 2.0**-52  # 52 bits, so that u * total never rounds up to total


def sample(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [R] and their log-probabilities fp32 [R] under the raw distribution (temperature 1).

    logits: [R, V], any float dtype; all arithmetic is fp32 or wider. A row whose logits are not numbers gets the
    token 0 and nan, and harms no other.
    """
    table = sampling_settings(len(logits), **vars(settings)).to(logits.device)
    sampled = sample_tokens(logits, table)
    return sampled.tokens.clamp_min(0), sampled.log_probs


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` most probable tokens int64 [R, count] and their raw log-probabilities fp32 [R, count]."""
    values, tokens = logits.float().log_softmax(-1).topk(count, dim=-1)
    return tokens, values


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 over uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
