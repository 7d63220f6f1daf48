"""The largest model of a family of shapes that so many cards train in so many days."""

import functools
import itertools
import math
from dataclasses import dataclass, field

from liaoyuan.compute.plan.advice.outcome import TRIES, Asker, Outcome, check, check_rows, least_card_days
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import Layout
from liaoyuan.rundir import Progress, Report, silent
from liaoyuan.training.loop import TrainConfig

HEAD_DIM, KEY_HEADS = 128, 8
DEEP = (128, 80)  # hidden size over layers: published models from 7 to 405 billion weights have 80 to 140
WIDER = 3.5  # intermediate size over hidden size
CLOSE = 1.15  # weights of one that cannot be over those of one that can: near enough
MORE = 1.05  # of the models that are tried, weights of one over those of the one before


@dataclass(frozen=True)
class Wish:
    """What is asked of cards. days: at most, by the median. tokens_per_weight: that a model shall see.

    batch_tokens, sequence_length, vocab: of the job.
    """

    days: float
    tokens_per_weight: float = 20.0
    batch_tokens: int = 4 * 2**20
    sequence_length: int = 8192
    vocab: int = 128256


@functools.cache
def family(vocab: int, keys: int = KEY_HEADS) -> tuple[ModelConfig, ...]:
    """Return dense models of one shape, smallest first, each some more than the one before."""
    sizes = []
    for hidden in _widths(keys):
        shallow, deep = (max(4, round(hidden / over / 2) * 2) for over in DEEP)
        sizes += [(_size(hidden, layers, vocab, keys), hidden, layers) for layers in range(shallow, deep + 1, 2)]
    found, last = list[ModelConfig](), 0.0
    for size, hidden, layers in sorted(sizes):
        if size >= last * MORE:
            last = size
            found.append(_shaped(hidden, layers, vocab, keys))
    return tuple(found)


def _widths(keys: int) -> list[int]:
    """Return hidden sizes: multiples of 256, above 4,096 those that give every head of keys as many of queries."""
    return [*range(1024, 4096, 256), *range(4096, 2**16, max(256, keys * HEAD_DIM))]


def _size(hidden: int, layers: int, vocab: int, keys: int) -> int:
    """Return the weights of a model, norms left out."""
    wide, keys = round(hidden * WIDER / 256) * 256, math.gcd(hidden // HEAD_DIM, keys)
    return 2 * vocab * hidden + layers * hidden * (2 * hidden + 2 * keys * HEAD_DIM + 3 * wide)


def _shaped(hidden: int, layers: int, vocab: int, keys: int) -> ModelConfig:
    heads = hidden // HEAD_DIM
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=round(hidden * WIDER / 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, keys),
        head_dim=HEAD_DIM,
        dtype="bfloat16",
    )


def largest(asker: Asker, processes: int, wish: Wish, report: Report = silent) -> Outcome:
    """Return the largest model of the family that these cards train in the days, with its best layout.

    Formulas tell where to begin; how far the search of that model is from them tells which one is next.

    Raises:
        LiaoyuanError: not even the smallest, and why; or what is asked for makes no sense.
    """
    check(days=wish.days, processes=processes, tokens_per_weight=wish.tokens_per_weight)
    models = _Models(asker, processes, wish, family(wish.vocab), report)
    low, high, ratio, skip = -1, len(models.family), 1.0, 1
    found: Outcome | None = None
    place = models.last(low, high, ratio)
    for tried in itertools.count(1):
        one = models.searched(place) if place >= 0 else None
        if one and one.days.median <= wish.days:
            low, found = place, one
        else:
            high = max(place, 0)
        if high - low < 2 or (found and tried >= TRIES and models.close(low, high)):
            break
        if one and math.isfinite(one.days.median):
            ratio = one.days.median / models.days(place)
            place = models.last(low, high, ratio)
        else:  # no layout fits: halfway to one that does, or further and further down
            below = (low + high) // 2 if found else max(high - skip, 0)
            place, skip = min(models.last(low, high, ratio), below), 2 * skip
        if found and place == low:
            break
        place = max(place, 0)
    if found is None:
        raise LiaoyuanError(
            f"{processes:,} x {asker.cluster.accelerator.name} train no model of this family in {wish.days:g} days; "
            f"the smallest has {_weights(models.family[0])}. {models.why_not(0)}"
        )
    report(Progress(1, 1, "model", _weights(found.job.model)))
    return found


@dataclass
class _Models:
    """What is known of the models of the family."""

    asker: Asker
    processes: int
    wish: Wish
    family: tuple[ModelConfig, ...]
    report: Report
    sketches: dict[int, Outcome | str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)  # by the search

    def job(self, place: int) -> tuple[Job, float]:
        """Return the job and the tokens that it sees."""
        model, wish, device = self.family[place], self.wish, self.asker.cluster.accelerator.device
        train = TrainConfig(steps=1, batch_tokens=wish.batch_tokens)
        job = Job(model, Layout(), self.processes, wish.sequence_length, train, device)
        check_rows(job)
        return job, wish.tokens_per_weight * model.num_parameters()

    def last(self, low: int, high: int, ratio: float) -> int:
        """Return the last place between both that takes no more than the days, if steps are `ratio` times as long as
        formulas say; or low.
        """
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.days(middle) * ratio <= self.wish.days else (low, middle)
        return low

    def days(self, place: int) -> float:
        """Return what formulas say: infinite where no layout fits, or the cards at their peak would take too long."""
        job, tokens = self.job(place)
        if (least := least_card_days(job, tokens, self.asker.profile) / self.processes) > self.wish.days:
            self.sketches[place] = f"At their peak the cards would take {least:,.3g} days."
        if place not in self.sketches:
            try:
                self.sketches[place] = self.asker.sketched(job, tokens)
            except LiaoyuanError as error:
                self.sketches[place] = str(error)
            done, most = len(self.sketches), math.ceil(math.log2(len(self.family))) + 1
            self.report(Progress(min(done, most), most, "model by formulas", _weights(job.model)))
        found = self.sketches[place]
        return math.inf if isinstance(found, str) else found.days.median

    def searched(self, place: int) -> Outcome | None:
        try:
            return self.asker.searched(*self.job(place), self.report)
        except LiaoyuanError as error:
            self.refused[place] = str(error)
            return None

    def close(self, low: int, high: int) -> bool:
        """Return whether a model that can be is hardly smaller than one that cannot."""
        if high == len(self.family):
            return False
        return self.family[high].num_parameters() <= CLOSE * self.family[low].num_parameters()

    def why_not(self, place: int) -> str:
        """Return what keeps this one from being trained in the days."""
        if place in self.refused:
            return self.refused[place]
        self.days(place)
        found = self.sketches[place]
        if isinstance(found, str):
            return found
        return f"It takes {found.days.median:,.3g}: take more cards, more days or fewer tokens a weight."


def _weights(model: ModelConfig) -> str:
    return f"{model.num_parameters() / 1e9:,.3g} billion weights"
