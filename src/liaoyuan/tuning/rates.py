"""Learning rates that hold for a size of model, where the user names none.

Two points that are known to work are joined by a straight line in logarithms: 2e-5 for seven billion parameters, the
value that most recipes for full fine-tuning share, and 1e-3 for the 0.6 million of a model that a laptop trains from
nothing. Adapters take five times as much (1e-4 at seven billion; QLoRA, Dettmers et al. 2023, arXiv 2305.14314, has
1e-4 to 2e-4): B begins at zero, and its gradients are those of a few directions.
"""

import math

from liaoyuan.tuning.lora import Method

LARGE, SMALL = (7e9, 2e-5), (0.6e6, 1e-3)  # parameters, learning rate
ADAPTERS = 5.0  # times the rate of full fine-tuning


def learning_rate_for(parameters: int, method: Method) -> float:
    """Return the highest learning rate of a run, to two digits."""
    slope = math.log(LARGE[1] / SMALL[1]) / math.log(LARGE[0] / SMALL[0])
    size = min(max(float(parameters), SMALL[0]), LARGE[0])
    rate = LARGE[1] * (size / LARGE[0]) ** slope * (1.0 if method == "full" else ADAPTERS)
    return float(f"{rate:.1e}")
