"""How long passes over given tokens and updates from them take, in closed form: for plans that try many ways at once.

The products, attention and bytes of `serving.model_work`, which the engine and training share; a backward pass has two
products for each of the forward pass. Over several cards weights are sharded (FSDP): gathered for the forward and the
backward pass of each microbatch, gradients scattered after it, both while others compute, so that the longer of the two
counts, but for what nothing runs beside: the first gather and the last gradients. The optimiser reads and writes what
it keeps of a card's share once a step.
"""

import math
from dataclasses import dataclass

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.cost import seconds
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.work import Work, stream
from liaoyuan.compute.plan.serving.model_work import Served
from liaoyuan.models import ModelConfig
from liaoyuan.tuning.packing import MICROBATCH_TOKENS

MASTER_BYTES = 4  # of a weight: fp32
ADAMW_BYTES = 8  # of a weight: two moments in fp32
STEP_TRAFFIC = 7 * 4  # bytes of a weight that AdamW moves: gradient, master and moments read, the last three written
NORM_TRAFFIC = 4  # and for the gradient's norm


@dataclass(frozen=True)
class Update:
    """What an update learns from. tokens: that the model reads, over all cards; context: that each sees on the mean;
    rows: tokens whose log-probabilities are wanted. updates: into which they are cut, a step of the optimiser each.
    """

    tokens: float
    context: float
    rows: float
    updates: int = 1


@dataclass(frozen=True)
class Scale:
    """By what the prices are to be multiplied on a machine, and seconds of a pass forward and back that come on top."""

    computing: float = 1.0
    each: float = 0.0


class UpdatePrice:
    """Prices of passes and updates of one model on one profile, whose figures are taken at their medians.

    scale: by which what is computed is multiplied, and seconds of a pass forward and back that nothing explains, as
    measured beside the prices; see `measured`.
    """

    def __init__(
        self,
        model: ModelConfig,
        cluster: Cluster,
        profile: DeviceProfile,
        scale: "Scale | None" = None,
        trained: float = 1.0,
    ) -> None:
        """trained: share of the weights that are trained (adapters: a small one)."""
        self.served, self.cluster, self.profile = Served(model), cluster, profile
        self.scale, self.trained = scale or Scale(), trained
        self._fabric = Fabric(cluster, profile)

    def state_bytes(self, cards: int) -> float:
        """Return what a card holds of weights, gradients and the optimiser between and in steps."""
        model = self.served.model
        element, weights = self.served.size, model.num_parameters()
        kept = (MASTER_BYTES if element < 4 else 0) + ADAMW_BYTES + 4  # gradients are summed in fp32
        return weights * (element + self.trained * kept) / cards

    def forward(self, update: Update, cards: int = 1) -> float:
        """Return the seconds of a pass without gradients over the tokens, shared out over cards."""
        return self._passes(update, cards, 1.0, 1)

    def learn(self, update: Update, cards: int = 1) -> float:
        """Return the seconds of the updates: passes forward and back, and steps of the optimiser."""
        backward = 2.0 if self.trained == 1.0 else 1.0 + self.trained  # of frozen weights no gradient is made
        return self._passes(update, cards, 1.0 + backward, 3) + update.updates * self.optimise(cards)

    def optimise(self, cards: int = 1) -> float:
        """Return the seconds of a step of the optimiser."""
        moved = self.served.model.num_parameters() * self.trained / cards * (STEP_TRAFFIC + NORM_TRAFFIC)
        return seconds(stream(moved, "float32"), self.profile) * self.scale.computing

    def _passes(self, update: Update, cards: int, times: float, gathers: int) -> float:
        """Return the seconds of passes over a card's share, `times` as much work as one forward; gathers: collectives
        over the weights for each microbatch.
        """
        own, rows = update.tokens / cards, update.rows / cards
        if own <= 0:
            return 0.0
        count = max(update.updates, math.ceil(own / MICROBATCH_TOKENS))
        tokens, scored = max(1, round(own / count)), max(1, round(rows / count))
        computing = self._computing(tokens, scored, update.context) * times * self.scale.computing
        computing += self.scale.each * times / 3.0
        exposed = sending = 0.0
        if cards > 1:
            part = self.served.model.num_parameters() * self.served.size * (cards - 1) / cards
            once = self._fabric.transfer("all-gather", part, tuple(range(cards))).seconds
            exposed = min(2, gathers) * once * self._alone()
            sending = gathers * once - exposed
        return count * (max(computing, sending) + exposed)

    def _alone(self) -> float:
        """Return the share of the weights that travel while nothing is computed: the ends of the model and the first
        layer as they are gathered to begin with, and their gradients at last.
        """
        model = self.served.model
        total = model.num_parameters()
        ends = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
        return (ends + (total - ends) / model.num_hidden_layers) / total

    def _computing(self, tokens: int, rows: int, context: float) -> float:
        """Return the seconds of one forward pass over so many tokens."""
        served = self.served
        works: list[tuple[int, Work]] = [*served.products(tokens, rows), *served.streams(tokens, rows)]
        works.append((served.model.num_hidden_layers, served.attention(tokens * context, tokens, float(tokens))))
        launching = self.profile.launch.median * sum(times for times, _ in works)
        device = sum(times * seconds(work, self.profile) for times, work in works)
        return device + launching if self.cluster.accelerator.device == "cpu" else max(device, launching)
