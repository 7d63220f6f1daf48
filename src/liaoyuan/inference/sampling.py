"""Sampling for a whole batch at once, with a random number per (seed, position).

The random numbers are counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), mixed by
splitmix64 (Steele et al. 2014), so that a sample never depends on the other requests in the batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liaoyuan.ops import log_probability, log_sum_exp, sample_tokens
from liaoyuan.ops.sampling import penalised

Bias = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Settings:
    """The sampling parameters of R rows, numpy.

    table: fp64 [R, 8], as `ops.sampling_settings` makes it.
    history: int64 [R, L], each row's tokens so far filled up with -1, and prompt_lengths int64 [R]; None if no row has
        penalties.
    mask: int32 [R, ceil(V / 32)], the tokens that are allowed as bits; None: all are.
    biased: int64 [B], the rows with a bias, and their biases.
    """

    table: np.ndarray
    history: np.ndarray | None = None
    prompt_lengths: np.ndarray | None = None
    mask: np.ndarray | None = None
    biased: np.ndarray | None = None
    biases: tuple[Bias, ...] = ()

    def of(self, rows: np.ndarray) -> "Settings":
        """Return the settings of some rows."""
        chosen = {
            name: value[rows] if isinstance(value, np.ndarray) and name != "biased" else value
            for name, value in vars(self).items()
        }
        if self.biased is not None:
            places = {int(row): index for index, row in enumerate(self.biased)}
            kept = [(index, places[int(row)]) for index, row in enumerate(rows) if int(row) in places]
            chosen["biased"] = np.array([index for index, _ in kept], dtype=np.int64) if kept else None
            chosen["biases"] = tuple(self.biases[place] for _, place in kept)
        return Settings(**chosen)


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return fp64 [R] in [0, 1) that depends on (seed, position) alone; seeds uint64 [R], positions int [R]."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(12)) * 2.0**-52  # 52 bits, so that u * total never rounds up to total


def sample(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens int64 [R], their log-probabilities fp32 [R] under the raw distribution (temperature 1), and those
    under the distribution that was drawn from.

    logits: [R, V], any float dtype; all arithmetic is fp32 or wider. A row whose logits are not numbers gets the
    token 0 and nan, and harms no other.
    """
    table = torch.from_numpy(settings.table).to(logits.device)
    history, lengths, mask = (_tensor(x, logits) for x in (settings.history, settings.prompt_lengths, settings.mask))
    found = sample_tokens(logits, table, history, lengths, mask)
    tokens, raw, drawn = found.tokens.clamp_min(0), found.log_probs, found.filtered_log_probs
    if settings.biased is None:
        return tokens, raw, drawn
    rows = torch.from_numpy(settings.biased).to(logits.device)
    history, lengths, mask = (None if x is None else x[rows] for x in (history, lengths, mask))
    again = sample_tokens(_biased(logits, settings), table[rows], history, lengths, mask)
    tokens[rows], drawn[rows] = again.tokens.clamp_min(0), again.filtered_log_probs
    raw[rows] = log_probs(logits[rows], tokens[rows].cpu().numpy())
    return tokens, raw, drawn


def as_one(sampled: Iterable[Tensor]) -> Tensor:
    """Return sampled tokens and both their log-probabilities as one tensor, fp64 [3, R], which one copy brings to the
    host: every token and every fp32 is a number of fp64.
    """
    tokens, *log_probs = sampled
    return torch.stack([tokens.clamp_min(0).double(), *(found.double() for found in log_probs)])


def on_host(sampled: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `as_one` made: tokens int64 [R], log-probabilities fp32 [R] each."""
    tokens, raw, drawn = sampled.cpu().numpy()
    return tokens.astype(np.int64), raw.astype(np.float32), drawn.astype(np.float32)


def log_probs(logits: Tensor, tokens: np.ndarray) -> Tensor:
    """Return the log-probability fp32 [R] of a given token of each row, with the bits that drawing it would give."""
    chosen = torch.from_numpy(tokens).to(logits.device)
    return log_probability(logits.gather(1, chosen[:, None])[:, 0], log_sum_exp(logits))


def kept_log_probs(logits: Tensor, tokens: Tensor, temperature: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the log-probability fp32 [R] of a given token of each row under the softmax of the tokens that are kept.

    Training computes it by this very function from the mask that the engine reported, so both have the same bits where
    their logits have. No gradient flows.

    Args:
        logits: [R, V]; tokens: int64 [R]; temperature: fp32 [R].
        allowed: the kept tokens as bits, int32 [R, ceil(V / 32)], see `Completion.masks`; None: all.
    """
    scores = kept_scores(logits, temperature, allowed)
    return log_probability(scores.gather(1, tokens[:, None])[:, 0], log_sum_exp(scores))


def kept_scores(logits: Tensor, temperature: Tensor, allowed: Tensor | None) -> Tensor:
    """Return the logits fp32 [R, V] over their temperature, -inf where a token is not kept; see `kept_log_probs`."""
    scores = logits.float() / temperature[:, None]
    if allowed is None:
        return scores
    bits = allowed[:, :, None] >> torch.arange(32, device=allowed.device) & 1
    return scores.masked_fill(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)


def log_probs_of(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the raw log-probabilities fp32 [T] of tokens after one row of logits [V]."""
    chosen = torch.tensor(tokens, device=logits.device)
    return log_probability(logits[chosen], log_sum_exp(logits[None]).expand(len(tokens)))


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` most probable tokens int64 [R, count] and their raw log-probabilities fp32 [R, count]."""
    scores, tokens = logits.topk(count, dim=-1)
    return tokens, log_probability(scores, log_sum_exp(logits)[:, None])


def distributions(logits: Tensor, settings: Settings) -> Tensor:
    """Return the log-probabilities fp32 [R, V] that rows are drawn from; -inf where a token cannot be drawn."""
    scores = logits.float().clone()
    if settings.biased is not None:
        scores[torch.from_numpy(settings.biased).to(logits.device)] = _biased(logits, settings)
    table = torch.from_numpy(settings.table).to(logits.device)
    temperature, top_k, top_p, min_p, *penalties, _ = table[:, :, None].unbind(1)
    history, lengths, mask = (_tensor(x, logits) for x in (settings.history, settings.prompt_lengths, settings.mask))
    if history is not None and lengths is not None:
        scores = penalised(scores, history, lengths, *penalties)
    if mask is not None:
        bits = mask[:, :, None] >> torch.arange(32, device=mask.device) & 1
        scores = scores.masked_fill(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)
    shares = (scores.double() / temperature.clamp_min(1e-9)).softmax(-1)
    ranked, order = shares.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    left = ranked.masked_fill((rank >= top_k) & (top_k > 0) | (rank > 0) & (temperature == 0), 0.0)
    before = left.cumsum(-1) - left
    left = left.masked_fill((before >= top_p * left.sum(-1, keepdim=True)) & (rank > 0) & (top_p < 1), 0.0)
    left = left.masked_fill(ranked < min_p * ranked[:, :1], 0.0)
    found = (left / left.sum(-1, keepdim=True)).log()
    return torch.empty_like(found).scatter_(-1, order, found).float()


def _biased(logits: Tensor, settings: Settings) -> Tensor:
    """Return the rows that have a bias, fp32 [B, V], with it."""
    assert settings.biased is not None
    rows = logits[torch.from_numpy(settings.biased).to(logits.device)].float()
    for row, bias in zip(rows, settings.biases, strict=True):
        tokens, values = zip(*bias, strict=True)
        row.index_add_(0, torch.tensor(tokens, device=row.device), torch.tensor(values, device=row.device))
    return rows


def _tensor(values: np.ndarray | None, like: Tensor) -> Tensor | None:
    return None if values is None else torch.from_numpy(values).to(like.device)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 over uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
