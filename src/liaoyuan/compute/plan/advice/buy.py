"""The fewest cards of a kind that train a job in so many days."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from liaoyuan.compute.plan.advice.outcome import TRIES, Asker, Outcome, check, check_rows, least_card_days
from liaoyuan.compute.plan.goodput.state import state_bytes
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.search.space import PIECE
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, silent

GROWTH = 1.05  # of the numbers of cards that are tried
LEAP = 0.75  # of the cards that it takes if all are as good as those before


def to_buy(asker: Asker, job: Job, days: float, tokens: float, report: Report = silent) -> Outcome:
    """Return the fewest cards of this kind that train the job in the days, with its best layout.

    In whole nodes; numbers that are tried are 5% apart. Formulas tell where to begin, as in `largest`.

    Raises:
        LiaoyuanError: no number of cards does it: a step has too few rows to be divided among so many. Or none fits.
    """
    check(days=days, tokens=tokens)
    check_rows(job)
    held = state_bytes(job.model, job.train) / asker.cluster.accelerator.usable_bytes
    least = max(held, least_card_days(job, tokens, asker.profile) / days)
    counts = [count for count in _counts(asker.cluster.per_node, job) if count >= least]
    clusters = _Clusters(asker, job, tokens, days, counts, report)
    found, ratio, tried = None, 1.0, 0
    while (count := clusters.first(ratio, found)) and not (found and tried >= TRIES):
        one, tried = clusters.searched(count), tried + 1
        if one is None:
            if len(clusters.refused) >= TRIES and not found:
                raise LiaoyuanError(clusters.refused[count])
            continue
        ratio = one.days.median / clusters.days(count)
        if one.days.median <= days:
            found = one
    if found is None:
        raise LiaoyuanError(
            f"No number of {asker.cluster.accelerator.name} trains this in {days:g} days, as far as its steps of "
            f"{job.train.batch_tokens:,} tokens can be divided.{clusters.fastest()}"
        )
    report(Progress(1, 1, "cluster", f"{found.job.processes:,} cards: {found.days.median:.3g} days"))
    return found


@dataclass
class _Clusters:
    """What is known of the numbers of cards, which are in order."""

    asker: Asker
    job: Job
    tokens: float
    most_days: float
    counts: list[int]
    report: Report
    sketches: dict[int, Outcome | None] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # of the search
    refused: dict[int, str] = field(default_factory=dict)  # by the search

    def first(self, ratio: float, found: Outcome | None) -> int | None:
        """Return the fewest cards that were not searched and take no more than the days, if steps are `ratio` times as
        long as formulas say; fewer than what was found.
        """
        enough = 0.0
        for count in self.counts:
            if found and count >= found.job.processes:
                return None
            if count < enough or count in self.outcomes or count in self.refused:
                continue
            if (took := self.days(count) * ratio) <= self.most_days:
                return count
            if math.isfinite(took):
                enough = count * took / self.most_days * LEAP
        return None

    def days(self, count: int) -> float:
        """Return what formulas say: infinite where no layout fits."""
        if count not in self.sketches:
            try:
                self.sketches[count] = self.asker.sketched(replace(self.job, processes=count), self.tokens)
            except LiaoyuanError:
                self.sketches[count] = None
        one = self.sketches[count]
        done = len(self.sketches)
        self.report(Progress(done, done + 1, "cluster by formulas", _told(count, one)))
        return one.days.median if one else math.inf

    def searched(self, count: int) -> Outcome | None:
        try:
            one = self.asker.searched(replace(self.job, processes=count), self.tokens, self.report)
        except LiaoyuanError as error:
            self.refused[count] = str(error)
            return None
        self.outcomes[count] = one
        return one

    def fastest(self) -> str:
        """Return which number of cards is the fastest, and what would help; or nothing, if none does it at all."""
        known = list(self.outcomes.values()) or [one for one in self.sketches.values() if one]
        if not known:
            return ""
        best = min(known, key=lambda one: one.days.median)
        return (
            f" The fastest are {_told(best.job.processes, best)}: let a step have more tokens (train.batch_tokens), "
            "that more cards can share."
        )


def _told(count: int, one: Outcome | None) -> str:
    return f"{count:,} cards: {one.days.median:,.3g} days" if one else f"{count:,} cards: no layout fits"


def _counts(per_node: int, job: Job) -> Iterator[int]:
    """Yield numbers of cards, in whole nodes and each some more than the one before, that divide a step's tokens."""
    pieces = max(1, job.sequence_length // PIECE)
    most = job.rows * pieces * job.model.num_key_value_heads * job.model.num_hidden_layers
    last = 0.0
    for nodes in itertools.count(1):
        processes = nodes * per_node
        if processes > most:
            return
        if processes >= last and _divides(processes, job, pieces):
            last = processes * GROWTH
            yield processes


def _divides(processes: int, job: Job, pieces: int) -> bool:
    """Return whether a number of processes may be a product of parts of rows, sequences, heads and layers."""
    left = processes
    for number in (job.rows, job.model.num_key_value_heads):
        left //= math.gcd(left, number)
    return left <= job.model.num_hidden_layers * pieces
