"""What an engine really takes for its steps on this machine: a few of each kind, timed, and the rates that fit them.

Steps of decoding with few and many sequences of few and many tokens, and steps that compute prompts. The least squares
of relative errors, no rate negative; what is left says how far the rates are to be trusted.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from liaoyuan.compute.plan.machine.profile import Figure
from liaoyuan.compute.plan.serving.engine_rates import EngineRates
from liaoyuan.compute.plan.serving.step_price import StepPrice
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder
from liaoyuan.rundir import Progress, Report, silent

BATCHES, DEEPEST = (1, 4, 16, 64, 256), 1024  # sequences that decode at once; tokens that they have at most
ROOM = 24 * 1024  # tokens of all of them together
TIMED = 6  # steps of each kind of decoding, of which the median counts
LEAST = 1e-9  # a rate is never quite nothing: figures are positive
SMALLEST_SIGMA = 0.02


@dataclass(frozen=True)
class Timed:
    """A step that was timed: new tokens and lengths of its sequences, tokens drawn, and its seconds."""

    counts: np.ndarray
    lengths: np.ndarray
    rows: int
    seconds: float


def measure(
    model: Decoder,
    price: StepPrice,
    rounds: int = 3,
    clock: Callable[[], float] = time.process_time,
    batches: Sequence[int] = BATCHES,
    report: Report = silent,
) -> tuple[EngineRates, list[Timed]]:
    """Return the rates of an engine of `model` on this machine, and the steps they are from.

    price: of this model with a profile of this machine, whose products and attention the rates put right.
    clock: seconds; CPU-seconds where others share the machine. batches: sequences that decode at once.
    """
    kinds = _kinds(model, batches) * rounds
    sizes = {"max_sequences": max(batches), "max_batch_tokens": 2048, "cache_tokens": ROOM}
    engine = Engine(model, EngineConfig(**sizes, decode_steps=1))
    timed = list[Timed]()
    for number, (batch, tokens) in enumerate(kinds, 1):
        timed.append(_decode(engine, batch, tokens, clock) if batch else _prefill(engine, tokens, clock))
        report(Progress(number, len(kinds), "kind of step", _told(batch, tokens)))
    return fit(timed, price), timed


def fit(timed: list[Timed], price: StepPrice) -> EngineRates:
    """Return the rates that fit timed steps best.

    Raises:
        LiaoyuanError: the steps are fewer than the rates.
    """
    if len(timed) < 5:
        raise LiaoyuanError(f"Four rates cannot be told from {len(timed)} steps.")
    rows = np.array([_features(step, price) for step in timed])
    seconds = np.array([step.seconds for step in timed])
    found = least_squares(rows / seconds[:, None], np.ones(len(seconds)))
    apart = np.log(np.maximum(rows @ found, LEAST) / seconds)
    sigma = max(SMALLEST_SIGMA, float(np.median(np.abs(apart)) * 1.4826))  # of a normal one
    names = ("step", "sequence", "products", "attention")
    figures = {
        name: Figure(median=max(LEAST, float(value)), sigma=sigma) for name, value in zip(names, found, strict=True)
    }
    return EngineRates(
        **figures,
        unexplained=Figure(median=1.0, sigma=sigma),
        rests_on=f"{len(timed)} steps of an engine on this machine, {math.expm1(sigma):.0%} beside its rates",
    )


def _features(step: Timed, price: StepPrice) -> list[float]:
    parts = price.parts(step.counts, step.lengths, step.rows)
    launching = parts.calls * price.profile.launch.median
    return [1.0, float(len(step.counts)), parts.products + launching, parts.attention]


def least_squares(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return x >= 0 with the least |rows x - wanted|: the best of all sets of unknowns that are not zero."""
    best, least = np.zeros(rows.shape[1]), math.inf
    for count in range(1, rows.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(rows.shape[1]), count)):
            values, *_ = np.linalg.lstsq(rows[:, chosen], wanted, rcond=None)
            left = float(((rows[:, chosen] @ values - wanted) ** 2).sum())
            if (values >= 0).all() and left < least * (1 - 1e-12):
                best, least = np.zeros(rows.shape[1]), left
                best[chosen] = values
    return best


def _kinds(model: Decoder, batches: Sequence[int]) -> list[tuple[int, int]]:
    """Return what is timed in a round: sequences that decode at once and the tokens that each has; or 0 and the
    tokens of a prompt.
    """
    longest = min(model.config.max_position_embeddings, DEEPEST + 4 * TIMED)
    deep = longest - 2 * TIMED - 2
    depths = sorted({max(2, deep // 16), deep})
    block = EngineConfig().block_size
    decoding = [
        (batch, depth)
        for batch, depth in itertools.product(batches, depths)
        if (batch + 1) * (depth + 2 * TIMED + block) < ROOM
    ]
    lengths = [length for length in (8, 32, 128, 512, 2048) if length < longest]
    return decoding + [(0, length) for length in [*lengths, deep]]


def _told(batch: int, tokens: int) -> str:
    return f"{batch} decode with {tokens:,} tokens" if batch else f"a prompt of {tokens:,} tokens"


def _decode(engine: Engine, batch: int, depth: int, clock: Callable[[], float]) -> Timed:
    for number in range(batch):
        _add(engine, number, depth, 2 * TIMED)
    generated = 0
    while generated < batch:  # all have their first token after these
        generated += sum(len(event.tokens) for event in engine.step() if event.tokens)
    engine.step()
    taken = []
    for _ in range(TIMED):
        begin = clock()
        engine.step()
        taken.append(clock() - begin)
    for number in range(batch):
        engine.abort(number)
    lengths = np.full(batch, depth + 2 + TIMED // 2, dtype=np.int64)
    return Timed(np.ones(batch, dtype=np.int64), lengths, batch, median(taken))


def _prefill(engine: Engine, length: int, clock: Callable[[], float]) -> Timed:
    _add(engine, 0, length, 2)
    begin = clock()
    engine.step()
    taken = clock() - begin
    engine.abort(0)
    return Timed(np.array([length]), np.array([length]), 1, taken)


def _add(engine: Engine, number: int, length: int, generated: int) -> None:
    """Queue a request that finds nothing in the prefix cache and runs to its limit."""
    engine.forget_prefixes()
    vocabulary = engine.model.config.vocab_size
    prompt = tuple((number * 7919 + place * 31) % vocabulary for place in range(length))
    engine.add(Request(number, prompt, SamplingParams(max_tokens=generated)))
