"""What updates really take on this machine beside their prices: passes of a few sizes, timed."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from liaoyuan.compute.plan.serving.measured import least_squares
from liaoyuan.compute.plan.tuning.update_price import Scale, Update, UpdatePrice
from liaoyuan.models import Decoder, packed_context
from liaoyuan.training import TrainConfig, make_optimiser

SIZES, DOCUMENT = (64, 256, 1024, 4096), 64  # tokens of a pass, and of its documents


def measure_updates(
    model: Decoder, price: UpdatePrice, rounds: int = 3, clock: Callable[[], float] = time.process_time
) -> Scale:
    """Return what fits updates of `model`, which changes none of its weights.

    price: of this model on this machine, with no scale. clock: as in `serving.measured.measure`.
    """
    optimiser = make_optimiser(model, TrainConfig(steps=1, optimiser="adamw", weight_decay=0.0))
    rows, taken = list[list[float]](), list[float]()
    for size in SIZES:
        update = Update(float(size), DOCUMENT / 2, float(size))
        found = median(_time(model, optimiser, size, clock) for _ in range(rounds))
        rows.append([1.0, price.learn(update)])
        taken.append(found)
    weights = np.array(taken)
    each, computing = least_squares(np.array(rows) / weights[:, None], np.ones(len(weights)))
    return Scale(max(1e-9, float(computing)), float(each))


def _time(model: Decoder, optimiser: object, size: int, clock: Callable[[], float]) -> float:
    lengths = [DOCUMENT] * (size // DOCUMENT)
    positions, context = packed_context(lengths)
    tokens = torch.arange(size) % model.config.vocab_size
    begin = clock()
    (-model(tokens, positions, context, tokens)).sum().backward()
    optimiser.accumulate()  # type: ignore[attr-defined]
    optimiser.step(0.0, 1.0)  # type: ignore[attr-defined]
    return clock() - begin
