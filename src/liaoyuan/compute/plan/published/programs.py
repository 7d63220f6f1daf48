"""One training step of a transformer that others wrote, in closed form: work of a card and what it sends, by layer.

The same figures price it as price a dry run (`cost.py`, `fabric.py`). Exact: products, attention, bytes and groups of
collectives, microbatches and stages. Not known of others' programs, so figures too (`Habits`): how much of the
element-wise work is fused, what the host needs for a call, and how much of what is sent hides behind computing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from liaoyuan.compute.plan.machine.cost import seconds
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.work import Work, product, stream
from liaoyuan.compute.plan.published.plausible import LATENT_RANK, LATENT_WIDTH, VALUE_DIM, Setup

LINEAR_BYTES = {"float8": 1, "float32": 4}
REST = 1.06  # of what is told, what a step takes: data, logging, clipping, and kernels that nobody counts
OPTIMISER_BYTES = 30.0  # read and written for a weight by Adam with a copy in single precision


@dataclass(frozen=True)
class Habits:
    """What a program does of which the source says nothing.

    calls: host seconds of a call, of the profile's. tp, dp, ep, pp: of what is sent, the share that never hides behind
    computing. jitter: how much longer all take for each doubling of nodes (waiting for the slowest).
    """

    calls: float = 3.0
    tp: float = 0.9
    dp: float = 0.35
    ep: float = 0.8
    pp: float = 0.5
    jitter: float = 0.003


@dataclass(frozen=True)
class Message:
    """A collective: its axis, when it is sent ("forward", "backward", "step"), how often, bytes of each rank."""

    axis: str
    phase: str
    kind: str
    sent: float
    ranks: Sequence[int]
    count: float = 1.0


@dataclass(frozen=True)
class Program:
    """A step. forward, backward: work of one layer for one microbatch; head: of what follows the last layer, both
    ways; update: of the optimiser. messages: of one layer ("forward", "backward"), or of the step. calls: of the host,
    for a layer, both ways.
    """

    setup: Setup
    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    head: tuple[Work, ...]
    update: tuple[Work, ...]
    messages: tuple[Message, ...]
    calls: float


@dataclass(frozen=True)
class Parts:
    """Seconds of a step, by what they pass with."""

    computing: float
    exposed: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.computing + sum(self.exposed.values())


def program(setup: Setup) -> Program:
    """Return a step of a job."""
    forward = _layer(setup)
    again = [work for work in forward if setup.recompute != "none" and work.kind != "product"]
    again += [_part(work, setup.again) for work in forward if setup.again and work.kind == "product"]
    backward = (*_backward(forward), *again)
    return Program(setup, forward, backward, _head(setup), _update(setup), tuple(_messages(setup)), _calls(setup))


def price(program: Program, profile: DeviceProfile, fabric: Fabric, habits: Habits, nodes: float) -> Parts:
    """Return how long a step takes on cards and links whose figures are certain."""
    setup = program.setup
    times = {
        "forward": sum(seconds(work, profile) for work in program.forward),
        "backward": sum(seconds(work, profile) for work in program.backward),
        "head": sum(seconds(work, profile) for work in program.head),
        "update": sum(seconds(work, profile) for work in program.update),
    }
    sent = dict[tuple[str, str], float]()
    for message in program.messages:
        taken = message.count * fabric.transfer(message.kind, message.sent, message.ranks).seconds
        sent[message.axis, message.phase] = sent.get((message.axis, message.phase), 0.0) + taken
    layer = _layer_seconds(times, sent, habits, profile.contention.median)
    host = program.calls * profile.launch.median * habits.calls
    layers = setup.shape.layers
    gpu = sum(layer.values())
    each = (gpu**6 + host**6) ** (1 / 6)  # whichever is slower; both, where they are alike
    stretch = each / gpu if gpu else 1.0
    whole, last = math.ceil(layers / setup.pp), layers // setup.pp
    mean = layers / setup.pp * each + times["head"] / setup.pp
    slowest = max(whole * each, last * each + times["head"]) if setup.pp > 1 else mean
    boundary = sent.get(("pp", "step"), 0.0) * habits.pp
    steady = setup.microbatches * (slowest + boundary)
    bubble = (setup.pp - 1) / setup.vpp * (mean + boundary)
    window = (times["backward"] * stretch) * whole
    dp = sent.get(("dp", "step"), 0.0)
    exposed = {"dp": habits.dp * dp + max(0.0, (1 - habits.dp) * dp - window)}
    exposed["bubble"] = bubble
    exposed["pp"] = setup.microbatches * boundary
    computing = steady - exposed["pp"] + times["update"]
    total = computing + sum(exposed.values())
    exposed["jitter"] = total * habits.jitter * math.log2(max(1.0, nodes))
    scale = profile.step.median * REST
    return Parts(computing * scale, {name: value * scale for name, value in exposed.items()})


def _layer_seconds(
    times: dict[str, float], sent: dict[tuple[str, str], float], habits: Habits, contention: float
) -> dict[str, float]:
    """Return seconds of a layer and a microbatch, by phase: computing, and what is sent and does not hide behind it."""
    found = dict[str, float]()
    for phase in ("forward", "backward"):
        computing = times[phase]
        shard, ring = sent.get(("shard", phase), 0.0), sent.get(("cp", phase), 0.0)
        hidden = shard + ring
        waits = habits.tp * sent.get(("tp", phase), 0.0) + habits.ep * sent.get(("ep", phase), 0.0)
        slowed = (contention - 1) * min(hidden, computing)
        found[phase] = computing + slowed + waits + max(0.0, hidden - computing) + 0.1 * min(hidden, computing)
    return found


def _layer(setup: Setup) -> tuple[Work, ...]:
    """Return the forward work of one layer for one microbatch, on one card."""
    shape, tp = setup.shape, setup.tp
    tokens = max(1, setup.micro * setup.seq // setup.cp)
    size = LINEAR_BYTES.get(setup.dtype, 2)
    norms = 14.0 * 2 * tokens * shape.hidden / (tp if setup.sequence else 1)
    inner = 9.0 * 2 * tokens * shape.hidden / tp
    return _streams_as_one(
        *_projections(setup, tokens, size),
        *_attention(setup, tokens),
        *_feed_forward(setup, tokens, size),
        stream((norms + inner) * (0.5 if setup.compiled else 1.0)),
    )


def _streams_as_one(*works: Work) -> tuple[Work, ...]:
    """Return works with those that only move bytes as one."""
    moved = sum(work.traffic for work in works if work.kind == "stream")
    return (*(work for work in works if work.kind != "stream"), stream(moved))


def _attention(setup: Setup, tokens: int) -> list[Work]:
    shape = setup.shape
    dtype = "float16" if setup.dtype == "float16" else "bfloat16"
    wide = shape.heads * shape.head_dim
    flops = 4.0 * tokens * setup.seq * wide / setup.tp
    heads = max(1, shape.heads // setup.tp)
    if setup.fused:
        moved = 2.0 * 4 * tokens * wide / setup.tp
        return [Work("attention", dtype, flops / 2, moved, tokens, setup.seq // 2, shape.head_dim, heads)]
    rows, batch = max(1, tokens // setup.micro), setup.micro * heads
    return [
        product(rows, setup.seq, shape.head_dim, dtype, batch=batch),
        product(rows, shape.head_dim, setup.seq, dtype, batch=batch),
        stream(5.0 * 2.0 * batch * rows * setup.seq, dtype),  # masked softmax, and dropout with its mask
    ]


def _projections(setup: Setup, tokens: int, size: int) -> list[Work]:
    """Return queries, keys and values, and what puts the heads together."""
    shape, tp, dtype = setup.shape, setup.tp, setup.dtype
    out = shape.heads * (shape.head_dim if not shape.latent else VALUE_DIM)
    works = [product(tokens, shape.hidden, max(1, out // tp), dtype, size=size)]
    if shape.latent:
        heads = shape.heads * LATENT_WIDTH
        works.append(product(tokens, 2 * LATENT_RANK, shape.hidden, dtype, size=size))
        works.append(product(tokens, max(1, heads // tp), LATENT_RANK, dtype, size=size))
        works.append(stream(2.0 * 4 * tokens * heads / tp))
    else:
        qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        works.append(product(tokens, max(1, qkv // tp), shape.hidden, dtype, size=size))
    return works


def _feed_forward(setup: Setup, tokens: int, size: int) -> list[Work]:
    shape, tp, dtype = setup.shape, setup.tp, setup.dtype
    up = shape.matrices - 1
    works = list[Work]()
    dense = shape.shared if shape.experts else float(shape.feed_forward)
    if dense >= 1:
        inner = max(1, round(dense / tp))
        works += [
            product(tokens, up * inner, shape.hidden, dtype, size=size),
            product(tokens, shape.hidden, inner, dtype, size=size),
            stream(2.0 * tokens * inner * (up + 2)),
        ]
    if shape.experts:
        local = max(1, shape.experts // setup.ep)
        rows = max(1, round(tokens * shape.topk * setup.ep / shape.experts / (tp // setup.etp)))
        inner = max(1, shape.feed_forward // setup.etp)
        works += [
            product(rows, up * inner, shape.hidden, dtype, batch=local, size=size),
            product(rows, shape.hidden, inner, dtype, batch=local, size=size),
            stream(2.0 * rows * local * inner * (up + 2)),
            stream(2.0 * rows * local * shape.hidden * 6),  # put in order by expert, and back
        ]
    return works


def _part(work: Work, share: float) -> Work:
    """Return the work of that share of the calls, as one."""
    return replace(work, flops=share * work.flops, traffic=share * work.traffic)


def _backward(forward: tuple[Work, ...]) -> tuple[Work, ...]:
    """Return the work of the backward pass: two products for each, two and a half times the fused attention."""
    found = list[Work]()
    for work in forward:
        if work.kind == "product":  # its two gradients
            found.append(replace(work, flops=2 * work.flops, traffic=2 * work.traffic, backward=True))
        elif work.kind == "attention":
            found.append(replace(work, flops=2.5 * work.flops, traffic=2 * work.traffic, backward=True))
        else:
            found.append(replace(work, traffic=1.5 * work.traffic, backward=True))
    return tuple(found)


def _head(setup: Setup) -> tuple[Work, ...]:
    """Return logits, loss and their backward pass, for one microbatch."""
    shape = setup.shape
    tokens, own = max(1, setup.micro * setup.seq // setup.cp), max(1, shape.vocab // setup.tp)
    dtype = "float16" if setup.dtype == "float16" else "bfloat16"
    return (
        product(tokens, own, shape.hidden, dtype),
        product(tokens, shape.hidden, own, dtype),
        product(shape.hidden, own, tokens, dtype),
        stream(20.0 * tokens * own),
        stream(12.0 * tokens * shape.hidden),
    )


def _update(setup: Setup) -> tuple[Work, ...]:
    own = sum(_own_weights(setup)) / (setup.sharded_over if setup.sharding != "none" else 1)
    return (stream(OPTIMISER_BYTES * own, "float32"),)


def _own_weights(setup: Setup) -> tuple[float, float]:
    """Return the weights, and those of experts, that a card holds if no data-parallel card holds them for it."""
    experts = setup.shape.expert_weights()
    rest = setup.shape.weights() - experts
    return rest / (setup.tp * setup.pp), experts / (setup.ep * setup.etp * setup.pp)


def _messages(setup: Setup) -> list[Message]:
    shape, tp, cp, dp = setup.shape, setup.tp, setup.cp, setup.dp
    tokens = setup.micro * setup.seq / cp
    wide = 2.0 * tokens * shape.hidden  # bytes of what passes between layers
    data = range(0, tp * cp * dp, tp)
    found = list[Message]()
    if tp > 1:
        sent = wide * 2 * (tp - 1) / tp
        found.append(Message("tp", "forward", "all-reduce", sent, range(tp), 2))
        found.append(Message("tp", "backward", "all-reduce", sent, range(tp), 4 if setup.recompute == "full" else 2))
    if cp > 1:
        keys = 2.0 * tokens * 2 * shape.kv_heads * shape.head_dim / tp * (cp - 1)
        ring = range(0, tp * cp, tp)
        found.append(Message("cp", "forward", "all-gather", keys, ring))
        found.append(Message("cp", "backward", "all-gather", 2 * keys, ring))
    if shape.experts and setup.ep > 1:
        rows = 2.0 * tokens * shape.hidden * shape.topk / tp * (setup.ep - 1) / setup.ep
        group = range(0, tp * setup.ep, tp) if setup.etp > 1 else range(setup.ep)
        again = 4 if setup.recompute == "full" else 2
        found += [Message("ep", "forward", "all-to-all", rows, group, 2)]
        found += [Message("ep", "backward", "all-to-all", rows, group, again)]
    if setup.pp > 1:
        apart = tp * cp * dp
        found.append(Message("pp", "step", "send", wide / tp, range(0, 2 * apart, apart), 2.0 * setup.vpp))
    dense, experts = _own_weights(setup)
    found += _data_messages(setup, dense, data, setup.sharded_over)
    if experts:
        among = range(0, tp * cp * dp, setup.ep * setup.etp)
        found += _data_messages(setup, experts, among, min(setup.sharded_over, len(among)))
    return found


def _data_messages(setup: Setup, own: float, data: range, over: int) -> list[Message]:
    """Return what data-parallel cards send for so many weights: of a layer if weights are divided, else of the step."""
    cards = len(data)
    if cards == 1:
        return []
    gradient = float(setup.gradient)
    group, part = data[:over], (over - 1) / over
    if setup.sharding in ("full", "gradients"):
        layer = own * setup.pp / setup.shape.layers
        found = [
            Message("shard", "forward", "all-gather", 2 * layer * part, group),
            Message("shard", "backward", "reduce-scatter", gradient * layer * part, group),
        ]
        if setup.sharding == "full":
            found.append(Message("shard", "backward", "all-gather", 2 * layer * part, group))
        if over < cards:
            others = data[::over]
            sent = gradient * own / over * 2 * (len(others) - 1) / len(others)
            found.append(Message("dp", "step", "all-reduce", sent, others))
        return found
    buckets = setup.shape.layers / setup.pp  # one message for each layer
    reduced, gathered = gradient * own / buckets, 2 * own / buckets
    if setup.sharding == "none":
        return [Message("dp", "step", "all-reduce", reduced * 2 * (cards - 1) / cards, data, buckets)]
    found = [
        Message("dp", "step", "reduce-scatter", reduced * part, group, buckets),
        Message("dp", "step", "all-gather", gathered * part, group, buckets),
    ]
    if over < cards:
        others = data[::over]
        sent = reduced / over * 2 * (len(others) - 1) / len(others)
        found.append(Message("dp", "step", "all-reduce", sent, others, buckets))
    return found


def _calls(setup: Setup) -> float:
    """Return the host's calls for a layer, both ways: of an eager program, about three for an operator."""
    shape = setup.shape
    forward = 24.0 + (8 if setup.tp > 1 else 0) + (0 if setup.fused else 4)
    if shape.experts:  # the router, what puts tokens in order, and two products for each expert of the card
        forward += 60 + 2 * shape.experts / setup.ep * (3 if setup.dtype == "float8" else 1)
    backward = 1.6 * forward + (forward if setup.recompute == "full" else 0)
    return (forward + backward) * (0.5 if setup.compiled else 1.0)
