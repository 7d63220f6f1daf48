"""What a step of reinforcement learning takes: rollouts, scoring, updates and new weights, on shared or split cards.

Rollouts are simulated by the engine's own scheduler: all questions come at once, the answers to one share its prompt,
and a batch ends with its longest answer. On shared cards the phases follow one another, and the cache of the engine
sleeps while training computes. On split cards rollouts are made a step ahead (staleness 1, as `rl.workers` are), so the
longer of both sides counts, and then new weights travel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.compute.plan.machine.cluster import GIB
from liaoyuan.compute.plan.serving import Ask, Machines, Replica, Served, StepPrice, serve
from liaoyuan.compute.plan.serving.plans import Kinds
from liaoyuan.compute.plan.span import Span, exactly
from liaoyuan.compute.plan.step.spread import Spread, spread
from liaoyuan.compute.plan.tuning.update_price import Scale, Update, UpdatePrice
from liaoyuan.inference.sizes import EngineConfig
from liaoyuan.models import ModelConfig
from liaoyuan.rundir import Progress, Report, silent
from liaoyuan.tuning.recipe import ReinforceConfig

CRITIC_FORWARDS = 1  # passes of a critic over what is learned before it is learned from


@dataclass(frozen=True)
class RlJob:
    """A run of reinforcement learning as far as its cost goes.

    prompt: tokens of a question, on the mean. answer: of an answer, before `rl.max_tokens` cuts it; spread: standard
    deviation of its logarithm, which makes the long tail. signal: share of the groups that teach something.
    corrected: whether another forward pass weighs tokens of rollouts that are not training's. trained: share of the
    weights that are trained. judge: a reward model that reads every answer.
    """

    model: ModelConfig
    rl: ReinforceConfig
    prompt: float
    answer: float
    spread: float = 0.6
    signal: float = 0.7
    corrected: bool = False
    trained: float = 1.0
    teacher: ModelConfig | None = None
    judge: ModelConfig | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each answer of a step, problem by problem, drawn from the seed of the run."""
        rl, random = self.rl, np.random.default_rng(self.rl.seed)
        drawn = random.lognormal(math.log(self.answer) - self.spread**2 / 2, self.spread, rl.problems * rl.group)
        return tuple(np.clip(drawn.round(), 1, rl.max_tokens).astype(int).tolist())

    @property
    def update(self) -> Update:
        """What a step learns from: of each group with signal its prompt once, and the answers that are learned."""
        rl = self.rl
        groups = rl.problems * (1.0 if rl.teacher_weight or rl.advantage == "gae" else self.signal)
        answers = rl.group if rl.advantage == "gae" else min(rl.update_group, rl.group)
        mean = float(np.mean(self.lengths))
        cuts = max(1, min(rl.minibatches, int(groups) // rl.minibatch_groups))
        return Update(groups * (self.prompt + answers * mean), self.prompt + mean / 2, groups * answers * mean, cuts)


@dataclass(frozen=True)
class Split:
    """Of `cards`, so many roll out in replicas of `tp` and the others train; rollout = 0: all do both, in turns."""

    cards: int
    rollout: int = 0
    tp: int = 1

    @property
    def training(self) -> int:
        return self.cards - self.rollout

    @property
    def replicas(self) -> int:
        return (self.rollout or self.cards) // self.tp

    def describe(self) -> str:
        side = f"{self.replicas} x tp {self.tp}" if self.tp > 1 else f"{self.replicas}"
        if not self.rollout:
            return f"shared by all {self.cards}, rollouts {side}"
        return f"{self.rollout} roll out ({side}), {self.training} train"


@dataclass(frozen=True)
class Phases:
    """Seconds of a step's parts: rollout, scoring (teacher, critic, reward model, the forward pass of the weights),
    training, synchronising; step: of the whole, of which the cards that wait longest do nothing for `idle`.
    """

    rollout: float
    scoring: float
    training: float
    synchronising: float
    step: float
    idle: float = 0.0


@dataclass(frozen=True)
class RlPlan:
    """A split, and what it gives. seconds: of a step, with its uncertainty. hours: of the run. why_not: why it cannot
    be, if not. tokens_per_second: of answers, over the whole step. width: by figure, the share of the uncertainty.
    """

    split: Split
    phases: Phases | None = None
    seconds: Span | None = None
    hours: Span | None = None
    tokens_per_second: float = 0.0
    width: dict[str, float] = field(default_factory=dict)
    why_not: str = ""


@dataclass
class RlPlanner:
    """Plans of one job. scale: see `UpdatePrice`; engine: sizes of the rollouts' engines. training: gives the seconds
    of a step's updates on so many cards, in place of the closed form, which then only tells how uncertain they are.
    """

    job: RlJob
    machines: Machines
    scale: Scale | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: Callable[[Update, int], float] | None = None

    def plan(self, split: Split, interval: bool = True) -> RlPlan:
        """Return what a split gives; interval: also how uncertain it is."""
        blocks, why_not = self._room(split)
        if why_not:
            return RlPlan(split, why_not=why_not)
        took, kinds, tokens = self._rollout(split, blocks)
        phases = self._phases(split, self.machines.certain, took)
        seconds, width = exactly(phases.step), dict[str, float]()
        if interval:
            found = self._interval(split, took, kinds, phases.step)
            seconds, width = found.span, found.shares
        return RlPlan(split, phases, seconds, seconds.times(self.job.rl.steps / 3600), tokens / phases.step, width)

    def search(self, cards: int, report: Report = silent) -> list[RlPlan]:
        """Return plans of the ways to split so many cards, the fastest first, which alone has its interval."""
        found, among = list[RlPlan](), splits(self.job.model, cards)
        for number, split in enumerate(among, 1):
            found.append(self.plan(split, interval=False))
            report(Progress(number, len(among), "split", split.describe()))
        found.sort(key=lambda one: one.phases.step if one.phases else math.inf)
        if found[0].phases:
            found[0] = self.plan(found[0].split)
        return found

    def _room(self, split: Split) -> tuple[int, str]:
        """Return how many blocks a replica's cache has, and why the split cannot be, if not."""
        served, card = Served(self.job.model, tp=split.tp), self.machines.cluster.accelerator
        state = self._price(self.machines.certain).state_bytes(split.training)
        if self.job.rl.advantage == "gae":
            state *= 2
        if state > card.usable_bytes:
            return 0, f"training takes {state / GIB:,.1f} GiB of a card, which has {card.usable_bytes / GIB:,.1f}"
        room = card.usable_bytes - served.weight_bytes
        room -= served.step_bytes(self.engine.max_batch_tokens, self.engine.max_sequences)
        if not split.rollout:
            room -= state - (served.weight_bytes if split.cards == 1 else 0)  # one card rolls out with what it trains
        blocks = int(room // (served.token_bytes * self.engine.block_size))
        longest = round(self.job.prompt) + max(self.job.lengths)
        if blocks * self.engine.block_size < longest:
            return (
                0,
                f"beside weights and training a card has room for {max(0, blocks) * self.engine.block_size:,} tokens",
            )
        most = self.engine.max_sequences * -(-longest // self.engine.block_size)
        return min(blocks, most), ""

    def _rollout(self, split: Split, blocks: int) -> tuple[float, Kinds, int]:
        """Return the seconds of the slowest replica's rollouts, its steps' kinds, and the tokens of all answers."""
        rl, lengths = self.job.rl, self.job.lengths
        groups = [lengths[place : place + rl.group] for place in range(0, len(lengths), rl.group)]
        shares = [groups[place :: split.replicas] for place in range(split.replicas)]
        shares = [share for share in shares if share]
        heaviest = max(shares, key=lambda share: sum(map(sum, share)))
        longest = max(shares, key=lambda share: max(map(max, share)))
        price = StepPrice(
            Served(self.job.model, tp=split.tp),
            self.machines.cluster,
            self.machines.certain.profile,
            self.machines.rates,
        )
        found = [self._serve(share, price, blocks) for share in {id(one): one for one in (heaviest, longest)}.values()]
        took, kinds = max(found, key=lambda one: one[0])
        return took, kinds, sum(lengths)

    def _serve(self, groups: Sequence[Sequence[int]], price: StepPrice, blocks: int) -> tuple[float, Kinds]:
        prompt = max(1, round(self.job.prompt))
        asks = [
            Ask(0.0, prompt, length, str(number), prompt) for number, group in enumerate(groups) for length in group
        ]
        most = prompt + max(map(max, groups))
        replica = Replica(price, self.engine, blocks, most)
        return serve(asks, [replica]).seconds, replica.kinds

    def _price(self, on: Machines, model: ModelConfig | None = None, trained: float | None = None) -> UpdatePrice:
        trained = self.job.trained if trained is None else trained
        return UpdatePrice(model or self.job.model, on.cluster, on.profile, self.scale, trained)

    def _phases(self, split: Split, on: Machines, rollout: float) -> Phases:
        scoring, training = self._scoring(split, on), self._training(split, on)
        sync = self._synchronising(split, on)
        if split.rollout:
            step = max(rollout, scoring + training) + sync
            return Phases(rollout, scoring, training, sync, step, abs(rollout - scoring - training))
        return Phases(rollout, scoring, training, sync, rollout + scoring + training + sync)

    def _training(self, split: Split, on: Machines) -> float:
        update, cards = self.job.update, split.training
        found = self._price(on).learn(update, cards)
        if self.training:
            found *= self.training(update, cards) / self._price(self.machines.certain).learn(update, cards)
        return 2 * found if self.job.rl.advantage == "gae" else found

    def _scoring(self, split: Split, on: Machines) -> float:
        """Return the seconds of passes without gradients: over what is learned, and over all answers (a judge) or the
        first of each problem (the divergence from the start).
        """
        job, update, cards = self.job, self.job.update, split.training
        rl, mean = job.rl, float(np.mean(job.lengths))
        own = self._price(on)
        passes = int(job.corrected) + (CRITIC_FORWARDS if rl.advantage == "gae" else 0)
        took = passes * own.forward(update, cards)
        if job.teacher:
            took += self._price(on, job.teacher).forward(update, cards)
        if job.judge:
            read = rl.problems * rl.group * (job.prompt + mean)
            took += self._price(on, job.judge).forward(Update(read, (job.prompt + mean) / 2, 0.0), cards)
        if rl.measure_kl:
            first = rl.problems * (job.prompt + mean)
            took += own.forward(Update(first, (job.prompt + mean) / 2, rl.problems * mean), cards)
        return took

    def _synchronising(self, split: Split, on: Machines) -> float:
        """Return the seconds of new weights on their way to where rollouts are made, and of a cache that wakes."""
        weights = self.job.model.num_parameters() * Served(self.job.model).size
        fabric = StepPrice(Served(self.job.model), on.cluster, on.profile, on.rates).fabric
        if split.rollout:
            ranks = tuple(range(split.cards))
            return fabric.transfer("broadcast", weights * self.job.trained / split.tp, ranks).seconds
        if split.cards == 1:
            return 0.0  # the engine computes with the very weights that are trained
        ranks = tuple(range(split.cards))
        return fabric.transfer("all-gather", weights * (split.cards - 1) / split.cards, ranks).seconds

    def _interval(self, split: Split, took: float, kinds: Kinds, usual: float) -> Spread:
        """Return a step's seconds, and how sure they are."""
        served = Served(self.job.model, tp=split.tp)
        chosen = kinds[:: max(1, len(kinds) // 100)]

        def engine(on: Machines) -> float:
            price = StepPrice(served, on.cluster, on.profile, on.rates)
            return sum(price(*kind) for kind in chosen)

        known = engine(self.machines.certain)

        def step(on: Machines) -> float:
            return self._phases(split, on, took * engine(on) / known).step

        return spread(usual, {name: (step(low), step(high)) for name, (low, high) in self.machines.ends().items()})


def splits(model: ModelConfig, cards: int) -> list[Split]:
    """Return the ways to use cards: rollouts on all of them, or on so many eighths, in replicas of any tp."""
    sides = [0, *sorted({max(1, round(cards * part / 8)) for part in range(1, 8)} - {cards})] if cards > 1 else [0]
    found, tp = list[Split](), 1
    while tp <= cards and model.num_key_value_heads % tp == 0:
        for side in sides:
            if (side or cards) % tp == 0 and (side or cards) >= tp:
                found.append(Split(cards, side, tp))
        tp *= 2
    return found
