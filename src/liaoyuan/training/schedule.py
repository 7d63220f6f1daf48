"""The learning rate as a function of the step alone, so that a resumed run needs no state for it."""

import math
from typing import Literal

Shape = Literal["cosine", "linear", "trapezoid", "constant"]

COSINE_FLOOR = 0.1  # of the peak; Hoffmann et al. 2022 (arXiv 2203.15556, app. B) decay tenfold
TRAPEZOID_DECAY = 0.4  # last share of the steps; Hägele et al. 2024 (arXiv 2405.18392) find 20 to 40% best


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int, shape: Shape) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`.

    It rises linearly to `peak` over `warmup_steps`, then falls: "cosine" to a tenth of the peak, "linear" to zero
    (Bergsma et al. 2025, arXiv 2502.15938), "trapezoid" stays and falls linearly to zero over the last 40% (warm-up,
    stable, decay: Hu et al. 2024, arXiv 2404.06395), "constant" stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    left = (steps - step) / max(1, steps - warmup_steps)  # from 1 just after the warm-up, towards 0 at the end
    if shape == "linear":
        return peak * left
    if shape == "cosine":
        return peak * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 - math.cos(math.pi * left)))
    if shape == "trapezoid":
        return peak * min(1.0, left / TRAPEZOID_DECAY)
    return peak
