"""What a row leaves open, filled in by draws over what is plausible: what does not fit in a card is not.

Draws of rows of one source use the same random numbers, field by field: whoever left a field out in two rows most
likely did the same thing in both, so that what one row tells about it holds for the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.published.accelerators import Machines
from liaoyuan.compute.plan.published.rows import Row

DRAWS = 24
FIELDS = (
    "gradient",
    "again",
    "experts",
    "layout",
    "seq",
    "batch",
    "micro",
    "vpp",
    "recompute",
    "fused",
    "sharding",
    "sequence",
    "compiled",
    "flops",
    "halved",
)
STATE_BYTES = 16  # of a weight in training: itself, its gradient, and the optimiser's copy and two moments
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
LATENT_RANK, LATENT_WIDTH, VALUE_DIM = 1024, 448, 128  # of latent attention (DeepSeek-AI 2024): ranks of queries and of
# keys on average, what a head has of queries, keys and values, and of values alone


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    feed_forward: of one expert, or of the dense layer. shared: feed-forward size that each token passes besides its
    experts, on average over layers (shared experts, layers that are dense). latent: attention through low ranks.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    gated: bool
    vocab: int
    experts: int = 0
    topk: int = 1
    shared: float = 0.0
    head_dim: int = 128
    latent: bool = False

    @property
    def attention_weights(self) -> float:
        """Weights of the attention of a layer."""
        if self.latent:
            ranks = 2.0 * LATENT_RANK * self.hidden
            return ranks + self.heads * (LATENT_WIDTH * LATENT_RANK + VALUE_DIM * self.hidden)
        return 2.0 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def matrices(self) -> int:
        """How many matrices a feed-forward layer has."""
        return 3 if self.gated else 2

    def layer_weights(self, active: bool) -> float:
        """Weights of a layer: all of them, or those that a token meets."""
        experts = (self.topk if active else self.experts) if self.experts else 1
        size = self.shared + experts * self.feed_forward
        return self.attention_weights + self.matrices * self.hidden * size + self.hidden * self.experts

    def expert_weights(self) -> float:
        """Weights of all experts of all layers."""
        return float(self.matrices * self.hidden * self.feed_forward * self.experts * self.layers)

    def weights(self, active: bool = False) -> float:
        """Weights of all layers and of both embeddings."""
        return self.layers * self.layer_weights(active) + 2.0 * self.vocab * self.hidden


@dataclass(frozen=True)
class Setup:
    """A job with nothing left open. batch: sequences of a step. sharded_over: among how many cards weights (or only the
    optimiser's state) are divided. fused: attention that keeps no scores. sequence: norms divided among tp too.
    gradient: bytes of one as it is sent.
    etp: tensor parallelism of experts. hardware, halved: how the source counts FLOPs, if it reports them.
    """

    shape: Shape
    cards: int
    seq: int
    batch: int
    micro: int
    tp: int
    pp: int
    vpp: int
    dp: int
    cp: int
    ep: int
    etp: int
    recompute: str
    again: float
    fused: bool
    sharding: str
    sharded_over: int
    sequence: bool
    compiled: bool
    dtype: str
    gradient: int
    hardware: bool
    halved: bool

    @property
    def microbatches(self) -> int:
        """Of a step, in each pipeline."""
        return max(1, round(self.batch / (self.micro * self.dp)))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq

    def model_flops(self) -> float:
        """FLOPs of a token, both ways, without what is computed again (Chowdhery et al. 2022, appendix B)."""
        shape = self.shape
        weights = shape.weights(active=True) - shape.vocab * shape.hidden
        return 6.0 * weights + 12.0 * shape.layers * shape.hidden * self.seq / (2 if self.halved else 1)

    def counted_flops(self) -> float:
        """FLOPs of a token as the source counts them (with recomputation: Narayanan et al. 2021, equation 3)."""
        again = (self.model_flops() - 6.0 * self.shape.vocab * self.shape.hidden) / 3
        return self.model_flops() + (again if self.hardware and self.recompute == "full" else 0.0)


def uniforms(draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Return for each field `draws` numbers that fill 0 to 1 evenly, in an order of its own."""
    chance = np.random.default_rng(7)
    return {name: (chance.permutation(draws) + 0.5) / draws for name in FIELDS}


def setups(row: Row, where: Machines, chances: dict[str, np.ndarray]) -> tuple[Setup, ...]:
    """Return one job for each draw; the same one for all, if the row leaves nothing open."""
    shape = shape_of(row)
    count = len(next(iter(chances.values())))
    return tuple(
        _setup(row, where, shape, {name: float(values[i]) for name, values in chances.items()}) for i in range(count)
    )


def shape_of(row: Row) -> Shape:
    """Return the sizes of a row's model; of what it leaves out, the usual (and what its number of weights asks for)."""
    vocab = row.vocab or 50_000
    hidden, layers = row.hidden, row.layers
    if hidden is None or layers is None:
        hidden, layers = _usual(row.params or 1e9, hidden, layers)
    heads = row.heads or max(1, hidden // 128)
    kv_heads = min(row.kv_heads or heads, heads)
    experts = row.experts or 0
    ffn = row.ffn or (max(64, hidden // 4) if experts else 4 * hidden)
    topk = row.topk or (2 if experts else 1)
    shape = Shape(layers, hidden, heads, kv_heads, ffn, bool(experts), vocab, experts, topk)
    if experts:
        return _with_experts(row, shape)
    shape = replace(shape, head_dim=max(1, hidden // heads))
    shape = replace(shape, gated=_gated(row, shape))
    if not row.ffn and row.params:
        per_layer = (row.params - 2.0 * vocab * hidden) / layers - shape.attention_weights
        return replace(shape, feed_forward=max(hidden, round(per_layer / shape.matrices / hidden)))
    return shape


def _with_experts(row: Row, shape: Shape) -> Shape:
    """Return it with attention, and what all tokens share, as the numbers of weights ask for."""
    if not row.kv_heads and row.heads:
        shape = replace(shape, latent=True, head_dim=160)
    elif row.params:  # what is left of the weights is attention's
        left = (row.params - replace(shape, head_dim=0).weights()) / shape.layers
        size = max(1.0, left / (2.0 * shape.hidden * (shape.heads + shape.kv_heads)))
        shape = replace(shape, head_dim=min(HEAD_DIMS, key=lambda known: abs(math.log(known / size))))
    if row.active:
        missing = (row.active - shape.weights(active=True)) / shape.layers / (shape.matrices * shape.hidden)
        return replace(shape, shared=max(0.0, missing))
    return replace(shape, shared=float(shape.feed_forward) if shape.topk > 4 else 0.0)


def _usual(params: float, hidden: int | None, layers: int | None) -> tuple[int, int]:
    """Return (hidden, layers) of so many weights, 12 hidden^2 in each layer and about 1 layer for 128 of width."""
    if hidden:
        return hidden, max(1, round(params / (12.0 * hidden * hidden)))
    width = math.sqrt(params / (12.0 * layers)) if layers else (params * 110 / 12) ** (1 / 3)
    width = max(128, 128 * round(width / 128))
    return width, layers or max(1, round(params / (12.0 * width * width)))


def _gated(row: Row, shape: Shape) -> bool:
    """Return whether the feed-forward layer has a gate, by the number of weights, else by its size."""
    if row.params:
        plain, gated = (abs(math.log(replace(shape, gated=gate).weights() / row.params)) for gate in (False, True))
        return gated < plain
    return shape.feed_forward != 4 * shape.hidden


def _setup(row: Row, where: Machines, shape: Shape, chance: dict[str, float]) -> Setup:
    room = where.cluster.accelerator.usable_bytes
    old = where.generation in ("volta", "ampere")
    seq = row.seq_len or _pick((2048, 2048, 4096) if old else (4096, 4096, 8192), chance["seq"])
    tp, pp, dp, cp = _layout(row, shape, room, chance["layout"], where.cluster)
    over, sharding = _sharding(row, shape, tp * pp, dp * cp, room, chance["sharding"])
    batch = row.batch or _batch(row.cards, tp * pp * cp, pp, dp, seq, chance["batch"])
    micro = row.micro_batch or _micro(batch, dp, pp, seq, sharding == "full", chance["micro"])
    vpp = row.vpp or (_pick((1, 1, 2, max(1, shape.layers // pp // 2)), chance["vpp"]) if pp > 1 else 1)
    ep = min(row.ep or (min(8, shape.experts, tp * dp) if shape.experts else 1), max(1, tp * cp * dp))
    own = shape.expert_weights() / (ep * pp)
    etp = 1
    if shape.experts and tp > 1 and (ep == 1 or 6 * own > 0.8 * room):  # cut along tp, or whole ones along tp too
        etp, ep = (tp, ep) if ep == 1 or chance["experts"] < 0.4 else (1, min(shape.experts, ep * tp))
    scores = 6.0 * micro * max(1, shape.heads // tp) * seq * (seq / cp)  # bytes: kept, softmax, and its gradient
    fused = scores > 0.2 * room or chance["fused"] < _fused(where.generation, row)
    held = (6 + 12 / over if sharding != "none" else 18) * shape.weights() / (tp * pp * ep)
    held = held if sharding != "full" else 18 * shape.weights() / (tp * pp * over)
    recompute = row.recompute or _recompute(
        shape, micro * seq / cp, tp, pp, fused, seq, max(0.0, room - min(held, room / 2)), chance["recompute"]
    )
    counted = row.reported in ("tflops", "mfu", "hfu")
    hardware = chance["flops"] < 0.5 if row.hardware is None else row.hardware
    return Setup(
        shape=shape,
        cards=row.cards,
        seq=seq,
        batch=batch,
        micro=micro,
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        cp=cp,
        ep=ep,
        etp=etp,
        recompute=recompute,
        again={"full": 1.0, "none": 0.0}.get(recompute, 0.0 if chance["again"] < 0.6 else 0.5),
        fused=fused,
        sharding=sharding,
        sharded_over=over,
        sequence=tp > 1 and chance["sequence"] < (0.3 if where.generation in ("volta", "ampere") else 0.9),
        compiled=chance["compiled"] < 0.3 if row.compiled is None else row.compiled,
        dtype=row.dtype or "bfloat16",
        gradient=2 if row.dtype == "float16" or chance["gradient"] < 0.5 or dp * cp == 1 else 4,
        hardware=counted and recompute == "full" and (hardware or row.reported == "hfu"),
        halved=counted and (chance["halved"] < 0.3 if row.halved is None else row.halved),
    )


def _pick(choices: Sequence[int], chance: float) -> int:
    return choices[min(len(choices) - 1, int(chance * len(choices)))]


def _layout(row: Row, shape: Shape, room: float, chance: float, cluster: Cluster) -> tuple[int, int, int, int]:
    """Return (tp, pp, dp, cp): what is stated, and else either all data-parallel or as many parts as must be."""
    cp = row.cp or 1
    if row.tp and row.pp:
        return row.tp, row.pp, row.dp or max(1, row.cards // (row.tp * row.pp * cp)), cp
    tp, pp = row.tp or 1, row.pp or 1
    inside = row.cards // max(1, cp)
    torus = cluster.accelerator.device == "xla"  # whose programs divide weights over all cards, as a rule
    if chance < 0.4 and not (
        row.tp or row.pp or torus
    ):  # tensor and pipeline parallel, the fewest parts that hold the state
        state = shape.weights() * 10
        while state / (tp * pp) > 0.6 * room and tp * pp < inside:
            if not row.tp and tp < min(8, cluster.per_node) and inside % (2 * tp * pp) == 0:
                tp *= 2
            elif not row.pp and pp < shape.layers and inside % (2 * tp * pp) == 0:
                pp *= 2
            else:
                break
    return tp, pp, max(1, inside // (tp * pp)), cp


def _batch(cards: int, parts: int, pp: int, dp: int, seq: int, chance: float) -> int:
    """Return sequences of a step: 4,096 to 16,384 tokens of a card, up to 32 million in all, but so many that a
    pipeline is filled.
    """
    tokens = min(_pick((4096, 8192, 16384), chance) * cards, 2**25)
    each = max(1, round(tokens / seq / dp), 4 * pp if pp > 1 else 1)
    return each * dp


def _micro(batch: int, dp: int, pp: int, seq: int, sharded: bool, chance: float) -> int:
    """Return a micro batch of about 2,048 to 8,192 tokens, or, where weights are gathered for each, of four times as
    many; of a pipeline now and then one of as many as it has stages.
    """
    each = max(1, batch // dp)
    wanted = max(1, _pick((2048, 4096, 8192), chance) * (4 if sharded else 1) // seq)
    if pp > 1 and chance > 0.75:
        wanted = max(wanted, each // pp)
    return max(1, round(each / max(1, round(each / wanted))))


def _sharding(row: Row, shape: Shape, parts: int, data: int, room: float, chance: float) -> tuple[int, str]:
    """Return among how many cards what is divided: of optimiser state and weights, as little as must be."""
    over = min(row.sharded_over or data, data)
    if not row.sharded_over and row.dp and not (row.tp or row.pp):  # its replicas are stated, and no other part
        over = max(1, data // row.dp)
    if data == 1 or over == 1:
        return 1, "none"
    if row.sharding:
        return over, row.sharding
    if shape.weights() * 6 / parts > 0.8 * room:  # not even weights and gradients fit
        return over, "full"
    if shape.weights() * STATE_BYTES / parts > 0.8 * room:
        return over, "optimizer"
    return (1, "none") if chance < 0.35 else (over, "optimizer")


def _fused(generation: str, row: Row) -> float:
    """Return how likely attention keeps no scores: by when such cards, and training in half precision, were usual."""
    if generation == "volta":
        return 0.05
    if generation == "ampere":
        return 0.1 if row.dtype == "float16" else 0.6
    return 1.0


def _recompute(shape: Shape, tokens: float, tp: int, pp: int, fused: bool, seq: int, room: float, chance: float) -> str:
    """Return how much is recomputed, among what fits (Korthikanti et al. 2022, section 4, for bytes of a layer)."""
    scores = 0.0 if fused else 5.0 * shape.heads * seq / shape.hidden
    wide = shape.feed_forward * max(1, shape.topk) / shape.hidden
    kept = {"none": 10 + 6 * wide + scores, "selective": 10 + 6 * wide}
    depth = min(pp, 8) * math.ceil(shape.layers / pp)
    fits = [name for name, per in kept.items() if tokens * shape.hidden * per / tp * depth < room]
    choices = [*fits, "full"] if fits else ["full"]
    return choices[min(len(choices) - 1, int(chance * len(choices)))]
