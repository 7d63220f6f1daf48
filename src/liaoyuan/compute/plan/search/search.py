"""The best layouts of a job on a cluster, ranked: thousands by formulas, the most promising by the whole prediction.

What cannot fit (`bounds.memory`) and what cannot be as fast as what was found (`Estimate.floor`) is left out; the rest
is put in order by the cheap estimate, and the first of it are run dry. `reasons.py` says why not the neighbours.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from liaoyuan.compute.plan.machine.cluster import GIB, Cluster
from liaoyuan.compute.plan.machine.cost import peak_flops
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.apart import as_they_come
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.search.bounds import FLOOR, Memory, memory
from liaoyuan.compute.plan.search.estimate import Estimate, Estimator
from liaoyuan.compute.plan.search.reckoned import Reckoned
from liaoyuan.compute.plan.search.space import Kept, axes_used, candidates, describe
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, silent

WHOLE = 12  # layouts that are run dry
LIKELY = 0.95  # of the memory by formulas that must fit for a layout to be predicted before others
ALIKE = 3  # of them, that have the same tp, pp, cp and ep
DIGITS = 4  # of seconds, beyond which two layouts are as fast

log = logging.getLogger(__name__)

Reckon = Callable[[Job], Reckoned]


@dataclass(frozen=True)
class Choice:
    """A layout of the job.

    estimate, memory: by formulas. found: by the whole prediction, where there was one.
    """

    job: Job
    memory: Memory
    estimate: Estimate
    found: Reckoned | None = None

    @property
    def seconds(self) -> float:
        """Of a step, as well as it is known."""
        return self.found.seconds.median if self.found else self.estimate.seconds

    @property
    def bytes(self) -> float:
        """Held at the peak, as well as it is known."""
        return self.found.bytes if self.found else self.memory.peak

    def memory_share(self, cluster: Cluster) -> float:
        """Return which part of what a card has for it is held at the peak."""
        return self.found.bytes / self.found.room if self.found else self.memory.peak / cluster.accelerator.usable_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of one card."""
        return self.job.tokens / self.job.processes / self.seconds

    def utilisation(self, peak: float) -> float:
        """Return the model FLOPs of a step over what cards of so many FLOP/s at their peak could do in it (MFU)."""
        return self.job.flops / self.job.processes / (self.seconds * peak)

    @property
    def words(self) -> str:
        return describe(self.job)

    @property
    def order(self) -> tuple[object, ...]:
        """What puts layouts in a total order: seconds, then axes used, then those axes themselves."""
        layout = self.job.layout
        axes = (layout.tp, layout.pp, layout.cp.ring, layout.cp.ulysses, layout.ep, layout.dp, layout.fsdp)
        rest = (layout.schedule, layout.recompute, self.job.train.microbatches)
        return self.found is None, _rounded(self.seconds), axes_used(layout), axes, rest


@dataclass(frozen=True)
class Ranking:
    """What a search has found: `choices`, best first, of which the first `whole` are predicted as a whole.

    legal: layouts that were looked at. too_large: of which so many hold too much by the formulas; too_slow: so many
    cannot be as fast as the best. refused: predicted, but they do not fit after all (or their prediction failed, with
    the reason). rests_on: what times rest on. peak: FLOP/s of a card's products in the model's dtype.
    """

    job: Job
    cluster: Cluster
    choices: tuple[Choice, ...]
    whole: int
    legal: int
    too_large: int
    too_slow: int
    refused: tuple[tuple[Choice, str], ...]
    rests_on: str
    peak: float

    @property
    def best(self) -> Choice:
        return self.choices[0]


def search(
    job: Job,
    cluster: Cluster,
    profile: DeviceProfile,
    reckon: Reckon | None = None,
    kept: Kept | None = None,
    whole: int | None = WHOLE,
    report: Report = silent,
    workers: int = 2,
) -> Ranking:
    """Return the layouts of `job` on the cluster, best first; the job's own layout says nothing but its settings.

    Args:
        job: its `layout` gives overlap, exact and compile; axes and microbatches are the search's.
        reckon: a whole prediction of one layout; None: by formulas alone.
        kept: axes that are not to be changed.
        whole: how many layouts are predicted as a whole; None: all that may still be the best.
        workers: processes that predict at the same time.

    Raises:
        LiaoyuanError: no layout is legal, or none fits; the sentence says by how much, and what would help.
    """
    reaches = tuple(link.reach for link in cluster.links if link.reach)
    legal = list(candidates(job, kept, reaches))
    if not legal:
        raise LiaoyuanError(_nothing_legal(job, kept))
    fitting, smallest = _fitting(legal, cluster.accelerator.usable_bytes, report)
    if not fitting:
        raise LiaoyuanError(_nothing_fits(job, cluster, smallest))
    certain = profile.median()
    choices = _estimated(fitting, Estimator(Fabric(cluster, certain), certain), report)
    found = _Found()
    if reckon:
        _predict(choices, cluster.accelerator.usable_bytes, found, reckon, whole, workers, report)
    slow = sum(choice.estimate.floor > found.best for choice in choices)
    done = {id(choice.job) for choice in (*found.fit, *(one for one, _ in found.refused))}
    rest = [choice for choice in choices if id(choice.job) not in done]
    ranked = sorted((*found.fit, *rest), key=lambda choice: choice.order)
    if not ranked:
        raise LiaoyuanError(f"Of {len(legal):,} layouts none fits: {found.refused[0][1]}.")
    return Ranking(
        job,
        cluster,
        tuple(ranked),
        len(found.fit),
        len(legal),
        len(legal) - len(fitting),
        slow,
        tuple(found.refused),
        found.fit[0].found.rests_on if found.fit and found.fit[0].found else profile.rests_on,
        peak_flops(job.model.dtype, profile),
    )


def _fitting(legal: Sequence[Job], room: int, report: Report) -> tuple[list[tuple[Job, Memory]], tuple[Job, Memory]]:
    """Return the jobs that may fit, with their memory, and the one that holds least."""
    found, smallest = list[tuple[Job, Memory]](), None
    for number, job in enumerate(legal):
        one = job, memory(job)
        if one[1].peak * FLOOR <= room:
            found.append(one)
        if smallest is None or one[1].peak < smallest[1].peak:
            smallest = one
        if number % 500 == 499 or number + 1 == len(legal):
            report(Progress(number + 1, len(legal), "layout", f"{len(found):,} may fit"))
    assert smallest
    return found, smallest


def _estimated(fitting: Sequence[tuple[Job, Memory]], estimator: Estimator, report: Report) -> list[Choice]:
    """Return the choices with their estimates, best first."""
    choices, best = list[Choice](), math.inf
    for number, (job, held) in enumerate(fitting):
        choices.append(Choice(job, held, estimator.of(job)))
        best = min(best, choices[-1].estimate.seconds)
        if number % 200 == 199 or number + 1 == len(fitting):
            report(Progress(number + 1, len(fitting), "estimate", f"best {best:.3g} s a step"))
    return sorted(choices, key=lambda choice: choice.order)


@dataclass
class _Found:
    """Whole predictions so far."""

    fit: list[Choice] = field(default_factory=list)
    refused: list[tuple[Choice, str]] = field(default_factory=list)
    failed: int = 0  # of them, those for which there was no prediction

    @property
    def best(self) -> float:
        return min((choice.seconds for choice in self.fit), default=math.inf)

    def take(self, choice: Choice, answer: Reckoned | LiaoyuanError | RuntimeError) -> None:
        if isinstance(answer, LiaoyuanError):
            self.refused.append((choice, str(answer)))
            self.failed += 1
        elif isinstance(answer, RuntimeError):
            log.warning("A prediction has failed:\n%s", answer)
            self.refused.append((choice, f"it could not be predicted ({str(answer).strip().splitlines()[-1]})"))
            self.failed += 1
        elif not answer.fits:
            told = f"it holds {answer.bytes / GIB:,.1f} GiB of the {answer.room / GIB:,.1f} that there are"
            self.refused.append((replace(choice, found=answer), told))
        else:
            self.fit.append(replace(choice, found=answer))


def _predict(
    choices: Sequence[Choice],
    room: int,
    found: _Found,
    reckon: Reckon,
    whole: int | None,
    workers: int,
    report: Report,
) -> None:
    """Predict the most promising choices as a whole."""
    total, asked = min(len(choices), whole or len(choices)), list[Choice]()

    def promising() -> Iterator[tuple[Job]]:
        for choice in _in_turn(choices, room):
            if len(asked) - len(found.refused) >= total or (found.failed >= total and not found.fit):
                return
            if choice.estimate.floor <= found.best:
                asked.append(choice)
                yield (choice.job,)

    for number, answer in as_they_come(reckon, promising(), workers):
        found.take(asked[number], answer)
        report(Progress(len(found.fit), total, "prediction", f"best {found.best:.3g} s a step"))
    report(Progress(total, total, "prediction", f"best {found.best:.3g} s a step"))


def _in_turn(choices: Sequence[Choice], room: int) -> Iterator[Choice]:
    """Yield the choices, best estimate first, but of those alike only the first few before all others, and those that
    fit only if the formulas are wrong after them.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    late = list[Choice]()
    for choice in choices:
        if choice.memory.peak * LIKELY > room:
            late.append(choice)
            continue
        layout = choice.job.layout
        family = layout.tp, layout.pp, layout.context, layout.ep
        seen[family] += 1
        if seen[family] <= ALIKE:
            yield choice
        else:
            late.append(choice)
    yield from late


@functools.cache
def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS}g}")


def _nothing_legal(job: Job, kept: Kept | None) -> str:
    told = f" with {', '.join(f'{name} = {value}' for name, value in kept.values)}" if kept and kept.values else ""
    return (
        f"No layout of this job is legal on {job.processes:,} processes{told}: a step has {job.rows:,} rows of "
        f"{job.sequence_length:,} tokens, and the axes must divide rows, heads ({job.model.num_key_value_heads} of "
        f"keys), layers ({job.model.num_hidden_layers}) and processes. Change train.batch_tokens or the processes."
    )


def _nothing_fits(job: Job, cluster: Cluster, smallest: tuple[Job, Memory]) -> str:
    least, held = smallest
    room = cluster.accelerator.usable_bytes
    return (
        f"No layout fits on {job.processes:,} x {cluster.accelerator.name}: the smallest ({describe(least)}) holds "
        f"about {held.peak / GIB:,.1f} GiB of the {room / GIB:,.1f} GiB that there are, "
        f"{held.lasting / GIB:,.1f} GiB of them weights and moments. More cards, a smaller model or "
        "master_dtype = 'bfloat16' would help."
    )
