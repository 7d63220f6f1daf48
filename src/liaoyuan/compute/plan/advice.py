"""What one can train on the cards one has, and what to buy for what one wants to train, in so many days.

Both ask the search for the best layout of a job, by formulas while they look, and by whole predictions in the end.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from liaoyuan.compute.plan.cluster import Cluster
from liaoyuan.compute.plan.cost import rate_of
from liaoyuan.compute.plan.dry_run import Job
from liaoyuan.compute.plan.profile import DeviceProfile
from liaoyuan.compute.plan.reckoned import by_formulas, by_prediction
from liaoyuan.compute.plan.search import Choice, search
from liaoyuan.compute.plan.span import Span
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import ModelConfig, config_from_dict
from liaoyuan.parallel import Layout
from liaoyuan.rundir import Progress, Report, silent
from liaoyuan.training.flops import TRAINING
from liaoyuan.training.loop import TrainConfig

DAY = 86400.0
# Of the time, what large jobs spend on steps that count (docs/notes on failures: 0.69 to 0.97 are published).
EFFECTIVE = Span(0.80, 0.90, 0.97)
HEAD_DIM, KEY_HEADS = 128, 8
DEEP = 128  # hidden size over layers, as in published models from 7 to 405 billion weights
WIDER = 3.5  # intermediate size over hidden size
STEP = 1.08  # of the hidden sizes that are tried, one over the one before
GROWTH = 1.15  # of the numbers of cards that are tried
SMALLER = 3  # models that are tried in the end if the whole prediction says that the largest takes longer


@dataclass(frozen=True)
class Outcome:
    """A job on its best layout. days: with its interval, failures included; megawatt_hours: of the cards alone.

    cost: in the currency of the cluster's `price_per_hour`, None if there is none.
    """

    choice: Choice
    cluster: Cluster
    steps: int
    days: Span

    @property
    def job(self) -> Job:
        return self.choice.job

    @property
    def card_hours(self) -> Span:
        return _times(self.days, 24.0 * self.job.processes)

    @property
    def megawatt_hours(self) -> Span | None:
        watts = self.cluster.accelerator.watts
        return _times(self.card_hours, watts / 1e6) if watts else None

    @property
    def cost(self) -> Span | None:
        price = self.cluster.accelerator.price_per_hour
        return _times(self.card_hours, price) if price else None


def outcome(
    job: Job,
    cluster: Cluster,
    profile: DeviceProfile,
    tokens: float,
    effective: Span = EFFECTIVE,
    whole: int = 0,
    report: Report = silent,
) -> Outcome:
    """Return how `tokens` are trained on by the job's best layout; `whole`: layouts predicted as a whole, 0: none.

    Raises:
        LiaoyuanError: no layout is legal, or none fits.
    """
    reckon = by_prediction(cluster, profile) if whole else by_formulas(cluster, profile)
    best = search(job, cluster, profile, reckon, None, whole or 1, report, workers=2 if whole else 0).best
    steps = math.ceil(tokens / job.train.batch_tokens)
    seconds = best.found.seconds if best.found else Span(best.seconds, best.seconds, best.seconds)
    return Outcome(best, cluster, steps, _days(steps, seconds, effective))


def _days(steps: int, seconds: Span, effective: Span) -> Span:
    """Return the days of so many steps; the widths of steps and of effective time are added in quadrature."""
    median = steps * seconds.median / effective.median / DAY
    above = math.hypot(math.log(seconds.high / seconds.median), math.log(effective.median / effective.low))
    below = math.hypot(math.log(seconds.median / seconds.low), math.log(effective.high / effective.median))
    return Span(median * math.exp(-below), median, median * math.exp(above))


def _times(span: Span, factor: float) -> Span:
    return Span(span.low * factor, span.median * factor, span.high * factor)


@dataclass(frozen=True)
class Wish:
    """What is asked of cards. days: at most, by the median. tokens_per_weight: that a model shall see.

    batch_tokens, sequence_length, vocab: of the job. effective: share of the time that counts.
    """

    days: float
    tokens_per_weight: float = 20.0
    batch_tokens: int = 4 * 2**20
    sequence_length: int = 8192
    vocab: int = 128256
    effective: Span = EFFECTIVE


def family(vocab: int, keys: int = KEY_HEADS) -> Iterator[ModelConfig]:
    """Yield dense models of one shape, smallest first: layers, heads and width grow together."""
    hidden, seen = 1024.0, set[int]()
    while hidden < 2**16:
        wide = keys * HEAD_DIM if hidden >= 4096 else 256
        size = round(hidden / wide) * wide
        if size not in seen:
            seen.add(size)
            layers = max(4, round(size / DEEP))
            for more in range(0, wide // DEEP, 2):  # as deep as the next, before it is as wide
                yield _shaped(size, layers + more, vocab, keys)
        hidden *= STEP


def _shaped(hidden: int, layers: int, vocab: int, keys: int) -> ModelConfig:
    heads = hidden // HEAD_DIM
    values = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": round(hidden * WIDER / 256) * 256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys if heads % keys == 0 else math.gcd(heads, keys),
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    return config_from_dict(values, "the family of shapes")


def largest(
    cluster: Cluster, profile: DeviceProfile, processes: int, wish: Wish, whole: int = 4, report: Report = silent
) -> Outcome:
    """Return the largest model of the family that these cards train in the days, with its best layout.

    Raises:
        LiaoyuanError: not even the smallest.
    """
    models = list(family(wish.vocab))
    known: dict[int, Outcome | None] = {}

    def possible(place: int) -> bool:
        if place not in known:
            known[place] = _trained(models[place], cluster, profile, processes, wish)
        found = known[place]
        return found is not None and found.days.median <= wish.days

    low, high = -1, len(models)
    # More products than the cards do at their very best in the days: no search is needed to tell.
    while high and _least_days(models[high - 1], cluster, profile, processes, wish) > wish.days:
        high -= 1
    total = max(1, math.ceil(math.log2(high + 1))) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
        report(Progress(min(len(known), total - 1), total, "model", f"{_weights(models[max(low, 0)])} can be"))
    if low < 0:
        raise LiaoyuanError(
            f"{processes:,} x {cluster.accelerator.name} train no model of this family in {wish.days:g} days: the "
            f"smallest has {_weights(models[0])} weights. Take more cards, more days or fewer tokens a weight."
        )
    found = known[low]
    for place in range(low, max(-1, low - SMALLER), -1) if whole else ():
        found = _trained(models[place], cluster, profile, processes, wish, whole, report)
        if found and found.days.median <= wish.days:
            break
    assert found
    report(Progress(total, total, "model", f"{_weights(found.job.model)} can be"))
    return found


def _weights(model: ModelConfig) -> str:
    return f"{model.num_parameters() / 1e9:,.3g} billion"


def _least_days(model: ModelConfig, cluster: Cluster, profile: DeviceProfile, processes: int, wish: Wish) -> float:
    tokens = wish.tokens_per_weight * model.num_parameters()
    flops = TRAINING * tokens * model.flops_per_token((wish.sequence_length + 1) / 2)
    rate = rate_of(model.dtype, profile).peak_tflops * 1e12
    return flops / (rate * processes) / DAY


def _trained(
    model: ModelConfig,
    cluster: Cluster,
    profile: DeviceProfile,
    processes: int,
    wish: Wish,
    whole: int = 0,
    report: Report = silent,
) -> Outcome | None:
    train = TrainConfig(steps=1, batch_tokens=wish.batch_tokens)
    job = Job(model, Layout(), processes, wish.sequence_length, train, cluster.accelerator.device)
    tokens = wish.tokens_per_weight * model.num_parameters()
    try:
        return outcome(job, cluster, profile, tokens, wish.effective, whole, report)
    except LiaoyuanError:
        return None


def to_buy(
    job: Job,
    cluster: Cluster,
    profile: DeviceProfile,
    days: float,
    tokens: float,
    effective: Span = EFFECTIVE,
    whole: int = 4,
    report: Report = silent,
) -> Outcome:
    """Return the fewest cards of this kind, in whole nodes, that train the job in the days, with its best layout.

    Raises:
        LiaoyuanError: no number of cards does it: a step has too few rows to be divided among so many.
    """
    flops = TRAINING * tokens * job.model.flops_per_token((job.sequence_length + 1) / 2)
    rate = rate_of(job.model.dtype, profile).peak_tflops * 1e12
    fewest = math.ceil(flops / (rate * effective.high * days * DAY))
    fastest: Outcome | None = None
    for tried, processes in enumerate(_counts(fewest, cluster.per_node, job), 1):
        try:
            found = outcome(replace(job, processes=processes), cluster, profile, tokens, effective)
        except LiaoyuanError:
            continue
        report(Progress(tried, tried + 1, "cluster", f"{processes:,} cards: {found.days.median:.3g} days"))
        if found.days.median <= days:
            sure = outcome(found.job, cluster, profile, tokens, effective, whole, report) if whole else found
            if sure.days.median <= days or not whole:
                report(Progress(tried + 1, tried + 1, "cluster", f"{processes:,} cards: {sure.days.median:.3g} days"))
                return sure
            found = sure
        if fastest is None or found.days.median < fastest.days.median:
            fastest = found
    best = (
        f" The fastest are {fastest.job.processes:,} cards, in {fastest.days.median:.3g} days: let a step have more "
        "tokens (train.batch_tokens), that more cards can share."
        if fastest
        else ""
    )
    raise LiaoyuanError(
        f"No number of {cluster.accelerator.name} trains this in {days:g} days, as far as its steps of "
        f"{job.train.batch_tokens:,} tokens can be divided.{best}"
    )


def _counts(fewest: int, per_node: int, job: Job) -> Iterator[int]:
    """Yield numbers of cards, in whole nodes and each some more than the one before, that divide a step's tokens."""
    rows, last = job.rows, 0.0
    for nodes in itertools.count(max(1, math.ceil(fewest / per_node))):
        processes = nodes * per_node
        if processes > rows * job.model.num_key_value_heads * job.model.num_hidden_layers:
            return
        if processes >= last and _divides(processes, job):
            last = processes * GROWTH
            yield processes


def _divides(processes: int, job: Job) -> bool:
    """Return whether a number of processes is a product of what rows, heads and layers can be divided into."""
    left = processes
    for number in (job.rows, job.model.num_key_value_heads):
        left //= math.gcd(left, number)
    return left <= job.model.num_hidden_layers
