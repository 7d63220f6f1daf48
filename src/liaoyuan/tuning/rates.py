"""Learning rates that hold for a size of model, where the user names none.

Two points that are known to work are joined by a straight line in logarithms. Full fine-tuning: 2e-5 for seven billion
parameters, the value that most recipes share, and 3e-3 for the 0.6 million of a model that a laptop trains from
nothing. Adapters: 1e-4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, has 1e-4 to 2e-4) and 5e-3. `docs/tune.md` has
a sweep of both at 1.3 million.
"""

import math

from liaoyuan.tuning.lora import Method

SIZES = (0.6e6, 7e9)  # parameters
RATES = {"full": (3e-3, 2e-5), "adapters": (5e-3, 1e-4)}  # at these sizes


def learning_rate_for(parameters: int, method: Method) -> float:
    """Return the highest learning rate of a run, to two digits."""
    (smallest, largest), (highest, lowest) = SIZES, RATES["full" if method == "full" else "adapters"]
    size = min(max(float(parameters), smallest), largest)
    slope = math.log(lowest / highest) / math.log(largest / smallest)
    return float(f"{highest * (size / smallest) ** slope:.1e}")
