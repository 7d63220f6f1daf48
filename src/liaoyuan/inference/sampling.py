"""Sampling for a whole batch at once, with a random number per (seed, position).

The random numbers are counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), mixed by
splitmix64 (Steele et al. 2014), so that a sample never depends on the other requests in the batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 64  # width of the lower level of two-level searches; about the root of a vocabulary


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

    logits: [R, V], any float dtype; all arithmetic is fp32 or wider.
    """
    scores = _in_chunks(logits)
    peaks = scores.amax(-1)
    peak = peaks.amax(-1)
    weights = (scores - peak[:, None, None]).exp_()  # proportional to the probabilities
    sums = weights.sum(-1)
    greedy = settings.temperature == 0.0
    if greedy.all():
        tokens = _argmax(scores, peaks)
    else:
        tokens = _sample_rows(scores, peak, weights, sums, settings)
        if greedy.any():
            tokens = torch.where(_tensor(greedy, scores), _argmax(scores, peaks), tokens)
    chosen = scores.flatten(1).gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, chosen - peak - sums.sum(-1).log()


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` most probable tokens int64 [R, count] and their raw log-probabilities fp32 [R, count]."""
    values, tokens = logits.float().log_softmax(-1).topk(count, dim=-1)
    return tokens, values


def _in_chunks(logits: Tensor) -> Tensor:
    """Return the logits as fp32 [R, chunks, CHUNK], filled up with -inf: every search goes by chunks."""
    rows, vocabulary = logits.shape
    rest = -vocabulary % CHUNK
    if rest:
        filled = torch.full((rows, vocabulary + rest), -torch.inf, device=logits.device)
        filled[:, :vocabulary] = logits
        logits = filled
    return logits.float().unflatten(-1, (-1, CHUNK))


def _argmax(scores: Tensor, peaks: Tensor) -> Tensor:
    """Return the first place of each row's highest score; peaks [R, chunks] is the highest of each chunk."""
    chunk = peaks.argmax(-1)
    return chunk * CHUNK + _take(scores, chunk).argmax(-1)


def _sample_rows(scores: Tensor, peak: Tensor, weights: Tensor, sums: Tensor, settings: Settings) -> Tensor:
    """Draw a token for every row (a greedy row draws at temperature 1 and is replaced by the caller).

    weights: exp(scores - peak), the distribution at temperature 1 but for its total; sums: of its chunks.
    """
    temperature = np.where(settings.temperature == 0.0, 1.0, settings.temperature).astype(np.float32)
    number = _tensor(settings.uniform, scores)
    if (temperature != 1.0).any():
        weights = ((scores - peak[:, None, None]) / _tensor(temperature, scores)[:, None, None]).exp_()
        sums = weights.sum(-1)
    tokens = _draw(weights, sums, number)
    filtered = (settings.top_p < 1.0) | (settings.top_k > 0) | (settings.min_p > 0.0)
    if filtered.any():
        rows = _tensor(np.flatnonzero(filtered), scores)
        tokens[rows] = _draw_filtered(weights[rows].flatten(1), settings, filtered, number[rows])
    return tokens


def _draw_filtered(weights: Tensor, settings: Settings, rows: np.ndarray, number: Tensor) -> Tensor:
    """Draw from what top_k, then top_p, then min_p leave of each row of weights [R, V]."""
    top_p, min_p = (_tensor(values[rows], number)[:, None] for values in (settings.top_p, settings.min_p))
    top_k = np.where(settings.top_k[rows] > 0, settings.top_k[rows], weights.shape[1])
    ranked, tokens = weights.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.double()
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    ranked = ranked.masked_fill(rank >= _tensor(top_k, number)[:, None], 0.0)
    ranked = ranked / ranked.sum(-1, keepdim=True)
    # A token stays if what precedes it has not yet reached top_p: the least set whose mass is at least top_p.
    # With top_p at 1, rounding must not drop the tail.
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.masked_fill((before >= top_p) & (rank > 0) & (top_p < 1.0), 0.0)
    ranked = ranked.masked_fill(ranked < min_p * ranked[:, :1], 0.0)
    place, _ = _search(ranked, number)
    return tokens.gather(-1, place[:, None]).squeeze(-1)


def _draw(weights: Tensor, sums: Tensor, number: Tensor) -> Tensor:
    """Return int64 [R]: for each row of weights [R, chunks, CHUNK], the first index whose running sum exceeds
    number * total. The sum runs over chunks, then within one chunk: much cheaper than a running sum of the row.
    """
    chunk, within = _search(sums, number)
    index, _ = _search(_take(weights, chunk), within)
    return chunk * CHUNK + index


def _take(values: Tensor, chunk: Tensor) -> Tensor:
    """Return one chunk of each row: values [R, chunks, CHUNK], chunk int64 [R] -> [R, CHUNK]."""
    return values[torch.arange(values.shape[0], device=values.device), chunk]


def _search(weights: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index and the place within its weight, in [0, 1), both [R]; an index of weight 0 is never found."""
    sums = weights.double().cumsum(-1)
    goal = (number * sums[:, -1])[:, None]
    index = (sums <= goal).sum(-1, keepdim=True)
    weight = weights.double().gather(-1, index)
    place = 1.0 - (sums.gather(-1, index) - goal) / weight
    return index.squeeze(-1), place.squeeze(-1).clamp_(0.0, 1.0 - 2.0**-52)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 over uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
