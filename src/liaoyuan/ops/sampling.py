"""The next token of every row of logits, with its log-probabilities, from a random number that is given.

Order of application, as in Hugging Face `generate`: repetition penalty (Keskar et al. 2019, arXiv 1909.05858, sec.
4.1), frequency and presence penalties (as vLLM and the OpenAI API define them), grammar mask, temperature, top-k, top-p
(Holtzman et al. 2020, arXiv 1904.09751, sec. 3.1), min-p (Nguyen et al. 2024, arXiv 2407.01082, sec. 3).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, TILED, triton
from liaoyuan.ops.log_sum_exp import RowSum, log_probability, plain_log_sum_exp
from liaoyuan.ops.operator import Operator, register, wide
from liaoyuan.ops.shapes import ShapeError, takes_shapes

COLUMNS = {  # of the settings, with what leaves a row as it is
    "temperature": 1.0,
    "top_k": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition": 1.0,
    "presence": 0.0,
    "frequency": 0.0,
    "uniform": 0.0,
}


class Sampled(NamedTuple):
    """Tokens int64 [R]; log-probabilities fp32 [R] under the untouched softmax; the same under what was drawn from."""

    tokens: Tensor
    log_probs: Tensor
    filtered_log_probs: Tensor


def sampling_settings(rows: int, **columns: Any) -> Tensor:
    """Return settings for `sample_tokens`, fp64 [R, 8]: a number or [R] for each name; what is not named is off.

    Args:
        temperature: 0 is greedy: the first of the most probable tokens.
        top_k: the most tokens that stay (0: all); top_p: then the least set whose mass is at least this (1: all);
            min_p: then those whose probability is at least this share of the highest (0: all).
        repetition: divides positive logits of tokens in the history and multiplies negative ones (1: off).
        presence, frequency: taken off a generated token's logit, once, and for every time that it came.
        uniform: in [0, 1), what a row draws with.

    Raises:
        LiaoyuanError: there is no such setting.
    """
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise LiaoyuanError(f"There is no sampling setting '{unknown[0]}'. There are: {', '.join(COLUMNS)}.")
    values = [torch.as_tensor(columns.get(name, off), dtype=torch.float64) for name, off in COLUMNS.items()]
    return torch.stack([value.expand(rows) for value in values], 1)


@takes_shapes(
    logits="float [R, V]",
    settings="fp64 [R, 8]",
    history="int64 [R, L]",
    prompt_lengths="int64 [R]",
    mask="bool/int32 [R, _]",
)
def sample_tokens(
    logits: Tensor,
    settings: Tensor,
    history: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Sampled:
    """Draw a token for every row of logits [R, V]. A row's result depends on that row alone, to the bit.

    Tokens run in the order of the vocabulary, and in a row with top_k, top_p or min_p from the most probable on (of
    equal ones the first comes first); drawn is the first whose running sum exceeds uniform times the whole. A row that
    has no token to draw (the mask allows none, or a logit is not a number) gets -1 and nan.

    Args:
        settings: fp64 [R, 8], see `sampling_settings`.
        history: int64 [R, L], for the penalties: the row's tokens so far, prompt first; -1 fills up.
        prompt_lengths: int64 [R], how many of `history` are the prompt; None: none.
        mask: which tokens a grammar allows: bool [R, V], or bits, int32 [R, ceil(V / 32)], the lowest bit first.

    Raises:
        LiaoyuanError: sizes do not fit.
    """
    rows, vocabulary = logits.shape
    words = vocabulary if mask is not None and mask.dtype is torch.bool else -(-vocabulary // 32)
    if mask is not None and mask.shape[1] != words:
        shapes = f"mask {list(mask.shape)} does not fit logits {list(logits.shape)}"
        raise ShapeError(f"sample_tokens: {shapes}: it must be {[rows, words]}.")
    if history is not None and prompt_lengths is None:
        prompt_lengths = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    if mask is not None and mask.dtype is torch.bool:
        mask = packed_mask(mask)
    function = SAMPLE_TOKENS.call if takes(SAMPLE_TOKENS, logits) and vocabulary else _sample_tokens
    return Sampled(*function(logits, settings, history, prompt_lengths if history is not None else None, mask))


def packed_mask(mask: Tensor) -> Tensor:
    """Return bool [R, V] as bits, int32 [R, ceil(V / 32)], the lowest bit first."""
    filled = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 32)).unflatten(1, (-1, 32)).long()
    words = (filled << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _sample_tokens(
    logits: Tensor,
    settings: Tensor,
    history: Tensor | None,
    prompt_lengths: Tensor | None,
    mask: Tensor | None,
    log_sum_exp: RowSum = plain_log_sum_exp,
) -> tuple[Tensor, Tensor, Tensor]:
    raw = wide(logits)
    temperature, top_k, top_p, min_p, *penalties, uniform = settings.double()[:, :, None].unbind(1)
    scores = raw if history is None or prompt_lengths is None else penalised(raw, history, prompt_lengths, *penalties)
    if mask is not None:
        bits = mask[:, :, None] >> torch.arange(32, device=mask.device) & 1
        scores = scores.masked_fill(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)
    peak, best = scores.max(-1, keepdim=True)
    greedy = torch.zeros_like(scores, dtype=torch.float64).scatter_(1, best, 1.0)
    weights = torch.where(temperature > 0, ((scores - peak) / temperature.clamp_min(1e-9).to(raw.dtype)).exp(), greedy)
    ranked, order = _filtered(weights, top_k, top_p, min_p)
    is_filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    shares = torch.where(is_filtered, ranked, weights)
    sums = shares.cumsum(-1)
    place = (sums <= uniform * sums[:, -1:]).sum(-1, keepdim=True).clamp_max(scores.shape[1] - 1)
    tokens = torch.where(is_filtered, order.gather(-1, place), place)
    log_probs = log_probability(raw.gather(-1, tokens), log_sum_exp(raw)[:, None])
    filtered = (shares.gather(-1, place) / sums[:, -1:]).log().to(log_probs.dtype)
    usable = peak.isfinite() & log_probs.isfinite()
    found = (tokens.where(usable, -1), *(x.where(usable, torch.nan).float() for x in (log_probs, filtered)))
    return found[0].squeeze(1), found[1].squeeze(1), found[2].squeeze(1)


def penalised(
    scores: Tensor, history: Tensor, prompt_lengths: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    is_generated = torch.arange(history.shape[1], device=history.device) >= prompt_lengths[:, None]
    is_token = (history >= 0) & (history < scores.shape[1])
    places = history.clamp(0, scores.shape[1] - 1)
    seen, counts = (
        torch.zeros_like(scores).scatter_add_(1, places, part.to(scores.dtype))
        for part in (is_token, is_token & is_generated)
    )
    repetition, presence, frequency = (x.to(scores.dtype) for x in (repetition, presence, frequency))
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    return torch.where(seen > 0, repeated, scores) - frequency * counts - presence * (counts > 0)


def _filtered(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights from the highest on, zero where they are filtered out, and their tokens."""
    ranked, order = weights.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    left = ranked.masked_fill((rank >= top_k) & (top_k > 0), 0.0)
    sums = left.cumsum(-1)
    # With top_p at 1, rounding must not drop the tail.
    left = left.masked_fill((sums - left >= top_p * sums[:, -1:]) & (rank > 0) & (top_p < 1), 0.0)
    return left.masked_fill(ranked < min_p * ranked[:, :1], 0.0), order


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Return settings that fp32 has too, since the self-test compares in it."""
    generator = torch.Generator().manual_seed(13)
    for rows, vocabulary, with_history, with_mask in (
        (1, 3, False, False),
        (20, 700, True, True),
        (9, 130, False, True),
    ):
        logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
        ways = torch.arange(rows)
        settings = sampling_settings(
            rows, temperature=torch.tensor([1.0, 0.0, 0.5, 2.0])[ways % 4], top_k=torch.tensor([0, 5, 40])[ways % 3],
            top_p=torch.tensor([1.0, 0.75])[ways % 2], min_p=torch.tensor([0.0, 0.0, 0.125])[ways % 3],
            repetition=1.25, presence=0.5, frequency=0.25,
            uniform=(torch.rand(rows, generator=generator) * 2**20).floor() / 2**20,
        )  # fmt: skip
        history = torch.randint(-1, vocabulary, (rows, 30), generator=generator) if with_history else None
        prompts = torch.randint(0, 30, (rows,), generator=generator) if with_history else None
        mask = packed_mask(torch.rand(rows, vocabulary, generator=generator) < 0.7) if with_mask else None
        yield logits, settings, history, prompts, mask


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    settings = sampling_settings(16, temperature=0.7, top_k=50, top_p=0.95, uniform=torch.rand(16))
    return (4 * torch.randn(16, 128_256)).to(dtype), settings, None, None, None


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    real = logits.new_empty(len(logits), dtype=torch.float32)
    return logits.new_empty(len(logits), dtype=torch.int64), real, torch.empty_like(real)


SAMPLE_TOKENS = register(
    Operator(
        name="sample_tokens",
        kernels=(NATIVE, triton("sampling"), TILED),
        schema="(Tensor logits, Tensor settings, Tensor? history, Tensor? prompt_lengths, Tensor? mask)"
        " -> (Tensor, Tensor, Tensor)",
        reference=_sample_tokens,
        fake=_fake,
        samples=_samples,
        flops=lambda *_: 0,
        workload=_workload,
        traffic=lambda logits, settings, history, prompt_lengths, mask: sum(
            x.nbytes for x in (logits, settings, history, mask) if x is not None
        ),
    )
)
