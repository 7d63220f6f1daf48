"""How long a step of the engine takes, by the figures of a profile and those of the engine."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.cost import seconds
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.serving.engine_rates import EngineRates
from liaoyuan.compute.plan.serving.model_work import Served


@dataclass(frozen=True)
class Parts:
    """What a step's time is made of, seconds: products and what moves bytes alone, attention, the exchange between
    processes. calls: of operators.
    """

    products: float
    attention: float
    sending: float
    calls: int


class StepPrice:
    """The price of steps of one replica whose processes are neighbours; every figure is taken at its median."""

    def __init__(
        self, served: Served, cluster: Cluster, profile: DeviceProfile, rates: EngineRates, graphs: bool = True
    ) -> None:
        """graphs: whether steps in which all decode are replayed, where the device can and the engine would."""
        self.served, self.cluster, self.profile, self.rates = served, cluster, profile, rates
        self._on_cpu = cluster.accelerator.device == "cpu"
        self._graphs = graphs and served.tp == 1 and cluster.accelerator.device == "cuda"
        self.fabric = Fabric(cluster, profile)
        self._known: dict[tuple[int, int], tuple[float, float, int]] = {}

    def __call__(self, counts: np.ndarray, lengths: np.ndarray, rows: int) -> float:
        """Return the seconds of a step in which sequences compute `counts` tokens each and have `lengths` then, int
        [S]; `rows` tokens are drawn.
        """
        parts, rates = self.parts(counts, lengths, rows), self.rates
        own = rates.step.median + rates.sequence.median * len(counts)
        computing = parts.products * rates.products.median + parts.attention * rates.attention.median
        launching = parts.calls * self.profile.launch.median
        if self._on_cpu:
            computing += launching
        elif not (self._graphs and int(counts.max(initial=0)) == 1):
            computing = max(computing, launching)
        return rates.unexplained.median * (own + computing + parts.sending)

    def parts(self, counts: np.ndarray, lengths: np.ndarray, rows: int) -> Parts:
        """Return what the same step is made of."""
        tokens = int(counts.sum())
        products, sending, calls = self._of_tokens(tokens, rows)
        attention = sum(
            layers * seconds(self.served.attention(*self._seen(counts, lengths, window)), self.profile)
            for window, layers in self._windows.items()
        )
        return Parts(products, attention, sending, calls + self.served.model.num_hidden_layers)

    @cached_property
    def _windows(self) -> dict[int | None, int]:
        """How many layers see so many tokens."""
        model, found = self.served.model, dict[int | None, int]()
        for layer in range(model.num_hidden_layers):
            found[model.window(layer)] = found.get(model.window(layer), 0) + 1
        return found

    def _seen(self, counts: np.ndarray, lengths: np.ndarray, window: int | None) -> tuple[float, int, float]:
        """Return pairs of a token and one that it sees, tokens, and tokens whose keys and values are read."""
        if window is None:
            pairs = counts * lengths - counts * (counts - 1) / 2
            return float(pairs.sum()), int(counts.sum()), float(lengths.sum())
        pairs = np.minimum(counts * lengths - counts * (counts - 1) / 2, counts * window)
        return float(pairs.sum()), int(counts.sum()), float(np.minimum(lengths, window + counts - 1).sum())

    def _of_tokens(self, tokens: int, rows: int) -> tuple[float, float, int]:
        """Return seconds of computing and of sending, and calls, of what depends on the number of tokens alone."""
        key = tokens, rows
        if key not in self._known:
            works = [*self.served.products(tokens, rows), *self.served.streams(tokens, rows)]
            ranks = tuple(range(self.served.tp))
            self._known[key] = (
                sum(times * seconds(work, self.profile) for times, work in works),
                sum(
                    times * self.fabric.transfer(kind, sent, ranks).seconds
                    for times, (kind, sent) in self.served.sent(tokens, rows)
                ),
                sum(times for times, _ in works),
            )
        return self._known[key]
