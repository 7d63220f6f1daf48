"""Rotary position embedding: its frequencies under every scaling, and the order of a head's dimensions.

Su et al. 2021 (arXiv 2104.09864). Our heads always hold their rotary pairs half-split, (i, i + D / 2), whatever a
family's files do: dimensions are put in that order when weights are read. A head that is rotated in part holds its
other dimensions as pairs of angle zero. So one kernel serves all.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotary:
    """The words of `rope_parameters` (`rope_scaling` and `rope_theta` in older files).

    partial: share of a head's dimensions that is rotated. interleaved: how the family's files lay out the pairs,
    (2 i, 2 i + 1), or else (i, i + D / 2).
    """

    rope_theta: float = 10000.0
    partial: float = 1.0
    interleaved: bool = False
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def width(self, head_dim: int) -> int:
        """Return how many of a head's dimensions are rotated."""
        return int(head_dim * self.partial)

    @property
    def angle_scale(self) -> float:
        """The factor of cosine and sine (YaRN, Peng et al. 2023, arXiv 2309.00071, eq. 15)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _magnitude(self.factor, self.mscale) / _magnitude(self.factor, self.mscale_all_dim)
        return _magnitude(self.factor)

    @property
    def score_scale(self) -> float:
        """The further factor of attention scores that DeepSeek's `mscale_all_dim` asks for."""
        if self.rope_type == "default" or not self.mscale_all_dim:
            return 1.0
        return _magnitude(self.factor, self.mscale_all_dim) ** 2

    def frequencies(self, width: int) -> Tensor:
        """Return radians per position, fp32 [width / 2], on the CPU."""
        plain = 1.0 / self.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
        if self.rope_type == "linear":
            return plain / self.factor
        if self.rope_type == "llama3":
            return self._llama3(plain)
        return self._yarn(plain, width) if self.rope_type == "yarn" else plain

    def _llama3(self, plain: Tensor) -> Tensor:
        """Llama 3.1: long waves are slowed down by `factor`, short ones kept, those between blended."""
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)  # over the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain

    def _yarn(self, plain: Tensor, width: int) -> Tensor:
        """YaRN, sec. 3.2: the ramp between kept and slowed-down dimensions is linear in the dimension's number."""
        low, high = (self._dimension(turns, width) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        place = torch.arange(width // 2, dtype=torch.float32, device="cpu")
        slowed = ((place - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain / self.factor * slowed + plain * (1 - slowed)

    def _dimension(self, turns: float, width: int) -> float:
        """Return the dimension's number whose wave turns so often within the original context."""
        waves = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(waves) / (2 * math.log(self.rope_theta))


PLAIN_ROTARY = Rotary()
TABLE = 8192  # positions whose angles are kept: 2 MiB where a head has 64 dimensions


def rotary_angles(positions: Tensor, rotary: Rotary, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, fp32 [N, head_dim / 2], of the rotary angles of positions [N]."""
    if type(positions) is Tensor and positions.is_cpu and len(positions) < TABLE and not torch.is_grad_enabled():
        with contextlib.suppress(IndexError):  # a position beyond the table
            cosine, sine = _angle_table(rotary, head_dim)
            return F.embedding(positions, cosine), F.embedding(positions, sine)
    return _angles(positions, rotary, head_dim)


@functools.lru_cache(maxsize=4)
def _angle_table(rotary: Rotary, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the angles of the first positions: decoding asks for few, and to compute them takes a dozen operators."""
    return _angles(torch.arange(TABLE, device="cpu"), rotary, head_dim)


@functools.lru_cache(maxsize=16)
def _on_device(rotary: Rotary, width: int, device: torch.device) -> Tensor:
    """Return the frequencies on an accelerator, where a step that is captured may not copy from the host."""
    with torch.inference_mode(False):
        return rotary.frequencies(width).to(device)


def _angles(positions: Tensor, rotary: Rotary, head_dim: int) -> tuple[Tensor, Tensor]:
    width = rotary.width(head_dim)
    plain = type(positions) is Tensor and not positions.is_cpu  # not one of a dry run, which must not be kept
    frequencies = _on_device(rotary, width, positions.device) if plain else rotary.frequencies(width)
    angles = positions.float()[:, None] * frequencies.to(positions.device)
    cosine, sine = angles.cos() * rotary.angle_scale, angles.sin() * rotary.angle_scale
    still = (head_dim - width) // 2
    if still:
        cosine = torch.cat([cosine, cosine.new_ones(len(positions), still)], 1)
        sine = torch.cat([sine, sine.new_zeros(len(positions), still)], 1)
    return cosine, sine


def head_order(rotary: Rotary, head_dim: int) -> list[int] | None:
    """Return which of a family's dimensions each of a head's dimensions here is (None: all are where they were)."""
    width = rotary.width(head_dim)
    pairs = [(2 * i, 2 * i + 1) if rotary.interleaved else (i, i + width // 2) for i in range(width // 2)]
    still = range(width, head_dim)
    half = len(still) // 2
    order = [first for first, _ in pairs] + [*still[:half]] + [second for _, second in pairs] + [*still[half:]]
    return None if order == list(range(head_dim)) else order


def _magnitude(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
