"""The next token of a row of logits: one program reads the row a few times, and sorts nothing.

Masses are whole numbers, weights in units of 2^-40 of the largest: their sums have no order, so that a row has the same
token whatever the tile. What stays of it is the beginning of its ranking, from the heaviest token on; it ends at a
weight that is found bit by bit, since the bits of positive numbers rise with them.

That search reads what it searches some fifty times. So a first kernel surveys the row, and where some filter is on
copies the heaviest tokens, as many as fit; a second one searches these if what stays is certainly among them, which
with usual settings it is, and else the row itself. Both give the same token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liaoyuan.ops.sampling import penalised
from liaoyuan.ops.triton.launch import launch, programs

ONE = tl.constexpr(2.0**40)  # the mass of the heaviest token: a vocabulary of 2^20 tokens sums to 2^60 at most
SHARE, WHOLE = tl.constexpr(31), tl.constexpr(2**31)  # bits of a share of a mass that is asked for, and all of it
WAYS = tl.constexpr(4)  # a search compares with so many bounds at a time
STEPS, LARGEST_STEP = tl.constexpr(15), tl.constexpr(2**28)  # 4^15 is above the bits of 1, the largest weight
TILE = 1024  # tokens at a time in a search
WIDE = tl.constexpr(8192)  # tokens at a time of what is summed in fp32, in an order that others may rely on
CANDIDATES = 2048  # of the heaviest tokens that are copied, at most
LEVELS = tl.constexpr(8)  # of weights, of which one ends the candidates
ABOVE = tl.constexpr(2**30)  # the bits of a weight that no token has


def sample_tokens(
    logits: Tensor, settings: Tensor, history: Tensor | None, prompt_lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator `sample_tokens`; penalties, which few rows have, are put on by PyTorch."""
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    temperature, top_k, top_p, min_p, *penalties, uniform = settings.unbind(1)
    scores = logits
    if history is not None and prompt_lengths is not None:
        columns = (x.double()[:, None] for x in penalties)
        scores = penalised(logits.float(), history, prompt_lengths, *columns).contiguous()
    shares = [(x.clamp(0.0, 1.0) * 2**31).long() for x in (top_p, uniform)]
    real = [x.float().contiguous() for x in (temperature, min_p)]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_probs, filtered = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    words = scores if mask is None else mask.contiguous()
    filters = (top_k.long(), shares[0], real[1])
    given = (logits, scores, words, real[0], *filters)
    sizes = (rows, vocabulary, 0 if mask is None else mask.shape[1])
    flags = {"MASK": mask is not None, "BLOCK": TILE, "CANDIDATES": CANDIDATES, "num_warps": 8}
    whole = [logits.new_empty(rows, kind, dtype=dtype) for kind, dtype in ((3, torch.int32), (2, torch.int64))]
    plain = logits.new_empty(rows, 2, dtype=torch.float32)
    heaviest = [logits.new_empty(rows, CANDIDATES, dtype=dtype) for dtype in (torch.float32, torch.int32)]
    survey = (*whole, plain, *heaviest)
    launch(_survey, (programs(rows),), logits, *given, *survey, *sizes, **flags)
    outputs = (tokens, log_probs, filtered)
    launch(_sample, (programs(rows),), logits, *given, shares[1], *survey, *outputs, *sizes, **flags)
    return tokens, log_probs, filtered


def log_sum_exp(logits: Tensor) -> Tensor:
    """Compute the operator `log_sum_exp`."""
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    found = logits.new_empty(rows, dtype=torch.float32)
    launch(_log_sum_exp, (programs(rows),), logits, logits, found, rows, vocabulary, num_warps=8)
    return found


@triton.jit
def _mass(weight):
    return (weight * ONE).to(tl.int64)


@triton.jit
def _share(total, share):
    """Return total * share / 2^SHARE, rounded down; neither product is above 2^62."""
    return (total >> SHARE) * share + (((total & (WHOLE - 1)) * share) >> SHARE)


@triton.jit
def _allowed_scores(scores, words, first, vocabulary, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tile of a row's scores, -inf where there is no token or the grammar has none."""
    column = first + tl.arange(0, BLOCK)
    score = tl.load(scores + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    if MASK:
        word = tl.load(words + column // 32, mask=column < vocabulary, other=0)
        score = tl.where(((word >> (column % 32)) & 1) == 1, score, float("-inf"))
    return score


@triton.jit
def _weights(scores, words, first, vocabulary, peak, heat, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tile of weights, at most 1, and their bits, which rise with them; -1 where there is no token."""
    weight = tl.exp((_allowed_scores(scores, words, first, vocabulary, MASK, BLOCK) - peak) / heat)
    bits = weight.to(tl.int32, bitcast=True)
    return weight, tl.where(first + tl.arange(0, BLOCK) < vocabulary, bits, -1)


@triton.jit
def _from(bounds, scores, words, vocabulary, peak, heat, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return for each bound the mass and the number of the tokens whose weights have at least its bits."""
    mass, number = tl.zeros([BLOCK, bounds.shape[0]], tl.int64), tl.zeros([BLOCK, bounds.shape[0]], tl.int32)
    for first in range(0, vocabulary, BLOCK):
        weight, bits = _weights(scores, words, first, vocabulary, peak, heat, MASK, BLOCK)
        is_in = bits[:, None] >= bounds[None, :]
        mass += _mass(weight)[:, None] * is_in.to(tl.int64)
        number += is_in.to(tl.int32)
    return tl.sum(mass, 0), tl.sum(number, 0)


@triton.jit
def _from_one(bound, scores, words, vocabulary, peak, heat, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mass and the number of the tokens whose weights have at least these bits."""
    mass, number = _from(tl.arange(0, WAYS) * 0 + bound, scores, words, vocabulary, peak, heat, MASK, BLOCK)
    return tl.max(mass, 0), tl.max(number, 0)


@triton.jit
def _end(wanted, COUNT: tl.constexpr, scores, words, vocabulary, peak, heat, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a beginning of the ranking ends that holds `wanted` (a number of tokens, or a mass): the bits of its
    last weight, and the mass and the number of the tokens that are heavier."""
    least = tl.cast(wanted * 0, tl.int32)
    step = least + LARGEST_STEP
    for _ in range(STEPS):
        mass, number = _from(least + step * tl.arange(0, WAYS), scores, words, vocabulary, peak, heat, MASK, BLOCK)
        holds = number >= wanted if COUNT else mass >= wanted
        least += step * tl.maximum(tl.sum(holds.to(tl.int32), 0) - 1, 0)
        step = step // WAYS
    mass, number = _from_one(least + 1, scores, words, vocabulary, peak, heat, MASK, BLOCK)
    return least, mass, number


@triton.jit
def _whole(logits, scores, words, vocabulary, MASK: tl.constexpr, BLOCK: tl.constexpr = WIDE):
    """Return the first of the best tokens and its score, the log of the sum of the logits' exponentials, and whether
    all of them are numbers below infinity."""
    peak = tl.full([], float("-inf"), tl.float32)
    best = tl.full([], 0, tl.int32)
    maximum = tl.full([], float("-inf"), tl.float32)
    summed, broken = tl.full([], 0.0, tl.float32), tl.full([], 0, tl.int32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        score = _allowed_scores(scores, words, first, vocabulary, MASK, BLOCK)
        broken += tl.sum(((logit != logit) | (logit == float("inf"))).to(tl.int32), 0)
        own_peak = tl.max(score, 0)
        own_best = tl.min(tl.where(score == own_peak, column, vocabulary), 0)
        best = tl.where(own_peak > peak, own_best, best)
        peak = tl.maximum(peak, own_peak)
        higher = tl.maximum(maximum, tl.max(logit, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        # rounded once in every kernel, or training and decoding might part
        summed = tl.fma(summed, tl.exp(maximum - finite), tl.sum(tl.exp(logit - finite), 0))
        maximum = higher
    return best, peak, maximum + tl.log(summed), broken == 0


@triton.jit
def _kept(top_k, top_p, min_p, whole, scores, words, vocabulary, peak, heat, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mass of what all three filters leave: each leaves a beginning of the ranking, the shortest counts."""
    kept = whole
    if top_k > 0:
        last, mass, number = _end(top_k, True, scores, words, vocabulary, peak, heat, MASK, BLOCK)
        own = _mass(last.to(tl.float32, bitcast=True))
        kept = tl.minimum(kept, mass + (top_k - number) * own)
    if top_p < WHOLE:
        wanted = tl.maximum(_share(kept, top_p), 1)  # the first token always stays
        last, mass, _ = _end(wanted, False, scores, words, vocabulary, peak, heat, MASK, BLOCK)
        own = tl.maximum(_mass(last.to(tl.float32, bitcast=True)), 1)
        kept = tl.minimum(kept, mass + (wanted - mass + own - 1) // own * own)
    if min_p > 0.0:
        mass, _ = _from_one(min_p.to(tl.int32, bitcast=True), scores, words, vocabulary, peak, heat, MASK, BLOCK)
        kept = tl.minimum(kept, mass)
    return kept


@triton.jit
def _place(target, equals, scores, words, vocabulary, peak, heat, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first token, in the order of the vocabulary, whose running sum is above the target: of masses, or of
    tokens whose weight has the bits `equals`, if that is not negative."""
    by_mass = tl.where(equals < 0, 1, 0).to(tl.int64)
    summed, token = target * 0, tl.cast(target * 0, tl.int32)
    for first in range(0, vocabulary, BLOCK):
        weight, bits = _weights(scores, words, first, vocabulary, peak, heat, MASK, BLOCK)
        part = _mass(weight) * by_mass + (bits == equals).to(tl.int64) * (1 - by_mass)
        running = summed + tl.cumsum(part, 0)
        inside = first + tl.arange(0, BLOCK) < vocabulary
        token += tl.sum(((running <= target) & inside).to(tl.int32), 0)
        summed += tl.sum(part, 0)
    return tl.minimum(token, vocabulary - 1)


@triton.jit
def _levels():
    """Return the bits of weights 2^-1, 2^-2, 2^-3, 2^-4, 2^-6, 2^-9 and 2^-13, and of none at all."""
    level = tl.arange(0, LEVELS)
    power = level + 1 + tl.where(level > 3, (level - 3) * (level - 2) // 2, 0)
    return tl.where(level == LEVELS - 1, 0, (127 - power) << 23)


@triton.jit(do_not_specialize=("rows",))
def _survey(
    logits, scores, words, temperature, top_k, top_p, min_p, whole, masses, plain, heaviest, heaviest_tokens,
    rows, vocabulary, stride, MASK: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Write what is to be known of each row.

    whole: its best token (-1: it has none), the number of candidates, the bits that their weights have at least.
    masses: of all tokens, of the candidates. plain: the best score, the log of the sum of exponentials.
    heaviest, heaviest_tokens: the candidates' scores and tokens, in the order of the vocabulary.
    """
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        own_logits, own_scores, own_words = logits + at * vocabulary, scores + at * vocabulary, words + at * stride
        token, peak, log_sum, whole_numbers = _whole(own_logits, own_scores, own_words, vocabulary, MASK)
        usable = whole_numbers & (peak > float("-inf")) & (peak < float("inf"))
        peak = tl.where(usable, peak, 0.0)
        heat, count, least = tl.load(temperature + row), tl.full([], 0, tl.int32), tl.full([], ABOVE, tl.int32)
        mass, held = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        if usable & (heat > 0.0):
            heat = tl.maximum(heat, 1e-9)
            bounds = _levels()
            above, number = _from(bounds, own_scores, own_words, vocabulary, peak, heat, MASK, BLOCK)
            fits = number <= CANDIDATES
            mass, least = tl.max(above, 0), tl.min(tl.where(fits, bounds, ABOVE), 0)
            held, count = tl.max(tl.where(fits, above, 0), 0), tl.max(tl.where(fits, number, 0), 0)
            if (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < WHOLE) | (tl.load(min_p + row) > 0.0):
                copied = count * 0
                for first in range(0, vocabulary, BLOCK):
                    _, bits = _weights(own_scores, own_words, first, vocabulary, peak, heat, MASK, BLOCK)
                    chosen = bits >= least
                    place = at * CANDIDATES + copied + tl.cumsum(chosen.to(tl.int32), 0) - 1
                    column = first + tl.arange(0, BLOCK)
                    score = _allowed_scores(own_scores, own_words, first, vocabulary, MASK, BLOCK)
                    tl.store(heaviest + place, score, mask=chosen)
                    tl.store(heaviest_tokens + place, column, mask=chosen)
                    copied += tl.sum(chosen.to(tl.int32), 0)
        tl.store(whole + row * 3, tl.where(usable, token, -1))
        tl.store(whole + row * 3 + 1, count)
        tl.store(whole + row * 3 + 2, least)
        tl.store(masses + row * 2, mass)
        tl.store(masses + row * 2 + 1, held)
        tl.store(plain + row * 2, peak)
        tl.store(plain + row * 2 + 1, log_sum)


@triton.jit
def _drawn(
    k, p, least, share, mass, scores, words, vocabulary, peak, heat, MASK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the place of what is drawn from the tokens that the filters leave, and their mass."""
    mass = _kept(k, p, least, mass, scores, words, vocabulary, peak, heat, MASK, BLOCK)
    target = _share(mass, share)
    equals, above, _ = _end(target + 1, False, scores, words, vocabulary, peak, heat, MASK, BLOCK)
    target = (target - above) // tl.maximum(_mass(equals.to(tl.float32, bitcast=True)), 1)
    return _place(target, equals, scores, words, vocabulary, peak, heat, MASK, BLOCK), mass


@triton.jit(do_not_specialize=("rows",))
def _sample(
    logits, scores, words, temperature, top_k, top_p, min_p, uniform,
    whole, masses, plain, heaviest, heaviest_tokens, tokens, log_probs, filtered,
    rows, vocabulary, stride, MASK: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        own_logits, own_scores, own_words = logits + at * vocabulary, scores + at * vocabulary, words + at * stride
        token, count, lightest = tl.load(whole + row * 3), tl.load(whole + row * 3 + 1), tl.load(whole + row * 3 + 2)
        mass, held = tl.load(masses + row * 2), tl.load(masses + row * 2 + 1)
        peak, log_sum = tl.load(plain + row * 2), tl.load(plain + row * 2 + 1)
        heat, log_share, usable = tl.load(temperature + row), tl.full([], 0.0, tl.float32), token >= 0
        if usable & (heat > 0.0):
            k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
            heat, share = tl.maximum(heat, 1e-9), tl.load(uniform + row)
            by_mass = p < WHOLE
            enough = (k > 0) | by_mass | (least.to(tl.int32, bitcast=True) >= lightest)  # a filter ends among them
            enough &= (k == 0) | (k <= count)
            enough &= (by_mass == 0) | (k > 0) | (held >= tl.maximum(_share(mass, p), 1))
            if ((k > 0) | by_mass | (least > 0.0)) == 0:
                no_weight = tl.full([], -1, tl.int32)
                target = _share(mass, share)
                token = _place(target, no_weight, own_scores, own_words, vocabulary, peak, heat, MASK, BLOCK)
            elif enough:
                own = heaviest + at * CANDIDATES
                place, mass = _drawn(k, p, least, share, mass, own, own_words, count, peak, heat, False, CANDIDATES)
                token = tl.load(heaviest_tokens + at * CANDIDATES + place)
            else:
                token, mass = _drawn(
                    k, p, least, share, mass, own_scores, own_words, vocabulary, peak, heat, MASK, BLOCK
                )
            score = tl.load(own_scores + token).to(tl.float32)
            log_share = (score - peak) / heat - tl.log(mass.to(tl.float32) / ONE)
        nothing, token = float("nan"), tl.maximum(token, 0)
        tl.store(tokens + row, tl.where(usable, token, -1).to(tl.int64))
        tl.store(
            log_probs + row,
            tl.where(usable, tl.minimum(tl.load(own_logits + token).to(tl.float32) - log_sum, 0.0), nothing),
        )
        tl.store(filtered + row, tl.where(usable, log_share, nothing))


@triton.jit(do_not_specialize=("rows",))
def _log_sum_exp(logits, found, rows, vocabulary):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        own = logits + tl.cast(row, tl.int64) * vocabulary
        _, _, log_sum, _ = _whole(own, own, own, vocabulary, False)
        tl.store(found + row, log_sum)
