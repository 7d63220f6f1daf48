"""Reinforcement learning on fresh problems, rewarded by the checked answer alone, or by any other reward.

GRPO (Shao et al. 2024, arXiv 2402.03300): a few minibatch updates per batch of rollouts with the clipped ratio, no KL
term, groups without signal dropped, of the others the most different rollouts learned from, and levels of difficulty
drawn by what they teach (see `curriculum`); `recipe` has its variants. Rollouts come from the inference engine on the
weights that are trained; whether its log-probabilities have the very bits of those of training is proven at the start
(`inference.prove`), and how far they are apart is measured at every step. Where they are not proven equal, truncated
importance weights correct for it. What happens in a step is a function of the seed, the step and the state, so a
killed run ends with the same weights and the same files of rollouts bit for bit.
"""

import contextlib
import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from liaoyuan.checkpoint.training_state import load_state, save_state
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import QUICK, prove
from liaoyuan.models import Decoder
from liaoyuan.models.lora import adapters_of, without_adapters
from liaoyuan.rundir import Lock, Metrics, Progress, Report, silent
from liaoyuan.tasks import Reward, Right, Task
from liaoyuan.tasks.seen import Seen
from liaoyuan.training import Stopped, TrainConfig, make_optimiser, stop_asked
from liaoyuan.training.loop import METRICS, STATE
from liaoyuan.tuning.critic import Critic, Pair, PairOptimiser
from liaoyuan.tuning.curriculum import Shares, follow, fresh_shares
from liaoyuan.tuning.doctor import Doctor
from liaoyuan.tuning.measures import kl_to, measure_rollouts, solved_shares
from liaoyuan.tuning.recipe import KEPT, ReinforceConfig, learning_rate_of
from liaoyuan.tuning.rollout import Rollouts
from liaoyuan.tuning.rollout_log import RolloutLog
from liaoyuan.tuning.rollout_workers import WorkerRollouts
from liaoyuan.tuning.sources import Drawn, LocalRollouts, Source
from liaoyuan.tuning.start import Start
from liaoyuan.tuning.teacher import advise
from liaoyuan.tuning.update import Lesson, by_token, learn, lesson_of, packs_of, teaches
from liaoyuan.tuning.validation import Best


@dataclass(frozen=True)
class ReinforceResult:
    """What a run did so far, killed and resumed parts together. Seconds leave validation and measures out."""

    steps: int = 0
    updates: int = 0  # steps in which enough groups carried signal
    generated_tokens: int = 0
    trained_tokens: int = 0  # rows of the update, prompts included
    rollout_seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0
    drawn: tuple[tuple[int, ...], ...] = ()  # levels of each step's problems
    exact: bool = False  # whether rollouts were proven to have the log-probabilities of training, bit for bit
    signal: tuple[float, ...] = ()  # share of each level's recent groups that taught something
    solved: tuple[float, ...] = ()  # share of right answers in each level's recent groups

    @property
    def rollout_tokens_per_second(self) -> float:
        return self.generated_tokens / self.rollout_seconds if self.rollout_seconds else 0.0

    @property
    def shares(self) -> Shares:
        return Shares(self.signal, self.solved)


def reinforce(
    model: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    config: ReinforceConfig,
    folder: Path,
    report: Report = silent,
    validate: Best | None = None,
    until: int | None = None,
    reward: Reward | None = None,
    must_be_exact: bool = False,
    start: Start | None = None,
    teacher: Decoder | None = None,
) -> ReinforceResult:
    """Train `model` in place for `config.steps` steps (or only up to step `until`), going on from `folder`.

    Args:
        reward: what answers are worth; what the task calls right if None.
        must_be_exact: end the run where a rollout has other bits than training.
        start: what `model` began as, if it has adapters, which rollout workers need to make it.
        teacher: who thinks something of each token, see `teacher`.

    Raises:
        Stopped: Ctrl-C or SIGTERM came; the state is saved.
        LiaoyuanError: the state in `folder` is of a run with another config, or another process writes there.
    """
    end = min(config.steps, until or config.steps)
    rewarded = reward or Right(task)
    with _Run(model, tokenizer, task, rewarded, config, folder, start, teacher) as run, stop_asked() as is_asked:
        first, begun = run.done.steps, time.monotonic()
        while run.done.steps < end:
            values = run.step(must_be_exact)
            steps = run.done.steps
            if validate and (steps % config.validate_every == 0 or steps == end):
                values |= validate(model)
            values["seconds_left"] = round((time.monotonic() - begun) / (steps - first) * (config.steps - steps), 1)
            note = run.write(values)
            stop = is_asked() and steps < end
            if steps % config.checkpoint_every == 0 or steps == end or stop:
                run.save()
            report(Progress(steps, config.steps, "step", _line(values), values.get("reward"), note))
            if stop:
                raise Stopped(f"Stopped after step {steps} of {config.steps}; the same command goes on from there.")
        return run.done


class _Run:
    """A run between its steps: the model, the optimiser, what was done so far, and the files in its folder."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        task: Task,
        reward: Reward,
        config: ReinforceConfig,
        folder: Path,
        start: Start | None = None,
        teacher: Decoder | None = None,
    ) -> None:
        self._model, self._config, self._folder, self._lock = model, config, folder, Lock(folder)
        self._teacher = teacher
        settings = TrainConfig(steps=config.steps, optimiser=config.optimiser, weight_decay=0.0)
        self._optimiser = make_optimiser(model, settings)
        self._about, self._made_of = (tokenizer, task, reward), start
        self._critic = Critic(model, config) if config.advantage == "gae" else None
        self._saved: tuple[Any, Any] = (model, self._optimiser)
        if self._critic:
            critic = self._critic
            self._saved = Pair(model, critic.model), PairOptimiser(self._optimiser, critic.optimiser)

    def __enter__(self) -> "_Run":
        with contextlib.ExitStack() as opened:
            self._open(opened)
            self._opened = opened.pop_all()
        return self

    def _open(self, opened: contextlib.ExitStack) -> None:
        """Open the files and the source; what is open already is closed if one of them cannot be."""
        model, config, folder = self._model, self._config, self._folder
        self._lock.take()
        opened.callback(self._lock.release)
        self._copy = None  # with adapters, the model without them is what the run began with
        if config.measure_kl and not adapters_of(model):
            self._copy = copy.deepcopy(model).eval().requires_grad_(False)
        done = _resume(*self._saved, config, folder)
        self.done = replace(done, exact=prove(model.eval(), QUICK).exact)
        self._seen = Seen(folder)
        self._metrics = Metrics(folder / METRICS, resume_from=done.steps)
        opened.callback(self._metrics.close)
        self._doctor = Doctor(folder, resume_from=done.steps)
        opened.callback(self._doctor.close)
        self._log = RolloutLog(folder, config.keep_rollouts_every, config.keep_rollouts_mb * 2**20, done.steps)
        arguments = (model, *self._about, config)
        self._source: Source = (
            WorkerRollouts(*arguments, folder, self._made_of) if config.workers else LocalRollouts(*arguments)
        )
        opened.callback(self._source.close)
        self._source.load(folder, done.steps)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._opened.close()

    def step(self, must_be_exact: bool) -> dict[str, Any]:
        """Roll out, learn, and keep what was rolled out; return the step's measures."""
        config, step = self._config, self.done.steps
        drawn = self._source.draw(step, self.done.shares)
        self._seen.add(drawn.rollouts.problems)
        are_same = self.done.exact and not drawn.staleness
        corrected = config.importance == "on" or (config.importance == "auto" and not are_same)
        begin = time.process_time()
        lesson, rows, learned = self._learn(drawn.rollouts, corrected)
        learning = time.process_time() - begin
        self.done = _add(_follow(self.done, drawn, config), drawn, rows, learning, self._model, self._further())
        if must_be_exact and are_same and learned.get("log_prob_gap", 0.0) > 0.0:
            raise LiaoyuanError(
                f"Rollouts of step {step} do not have training's bits ({learned['log_prob_gap']:.1e} nats apart), "
                "though that was proven at the start: see liaoyuan doctor --exact, or go on with exact = false."
            )
        self._log.write(step, drawn.rollouts, lesson)
        told = {"exact": self.done.exact, "corrected": corrected, "staleness": drawn.staleness}
        return self._measures(drawn) | learned | told | _speeds(self.done, drawn, rows, learning)

    def _learn(self, rollouts: Rollouts, corrected: bool) -> tuple[Lesson | None, int, dict[str, Any]]:
        """Return what was learned (None: nothing), from how many rows, and measures."""
        config, lesson, advice = self._config, lesson_of(rollouts, self._config), dict[str, float]()
        packs = packs_of(rollouts, lesson, config, self._model.embed_tokens.weight.device)
        if self._critic:
            packs, advice = self._critic.appraise(packs)
        if self._teacher and config.teacher_loss == "sampled":
            packs, said = advise(self._teacher, packs, config)
            advice |= said
        if advice:
            lesson = by_token(lesson, packs)
        rate = learning_rate_of(config, self.done.steps)
        learned = learn(self._model, self._optimiser, packs, config, rate, corrected, self._teacher, self._critic)
        rows = sum(len(one.tokens) for minibatch in packs for one in minibatch)
        return lesson if packs else None, rows, learned | advice

    def _further(self) -> float:
        """Return what else is computed for each row of an update, as a share of a forward pass of the policy."""
        length = float(self._config.max_tokens)
        teacher = self._teacher.config.flops_per_token(length) if self._teacher else 0.0
        return teacher / self._model.config.flops_per_token(length) + (4.0 if self._critic else 0.0)

    def _measures(self, drawn: Drawn) -> dict[str, Any]:
        values = measure_rollouts(drawn.rollouts, self._config)
        values |= {"level": sum(drawn.levels) / len(drawn.levels), "problems": len(drawn.levels)}
        if not self._config.measure_kl:
            return values
        with without_adapters([self._model]):
            return values | {"kl_start": kl_to(self._copy or self._model, drawn.rollouts, self._config)}

    def write(self, values: dict[str, Any]) -> str:
        """Write the measures of the last step; return what the doctor has to say of them, if anything."""
        step = self.done.steps - 1
        self._metrics.write(step, **values)
        return "\n".join(str(finding) for finding in self._doctor.look({"step": step, **values}))

    def save(self) -> None:
        extra = {"done": asdict(self.done), "config": self._config.model_dump(mode="json")}
        self._source.save(self._folder, self.done.steps)
        save_state(self._folder / STATE, self.done.steps, *self._saved, extra)


def _line(values: dict[str, Any]) -> str:
    return f"reward {values['reward']:.3f}" if "reward" in values else "nothing could be judged"


def _speeds(done: ReinforceResult, drawn: Drawn, rows: int, learning: float) -> dict[str, float]:
    """Return what the run has spent so far, and the step's tokens per CPU second."""
    generated = drawn.rollouts.generated_tokens / max(drawn.cpu_seconds, 1e-9)
    return {
        "generated_tokens": done.generated_tokens,
        "cpu_seconds": round(done.cpu_seconds, 3),
        "flops": done.flops,
        "rollout_tokens_per_second": round(generated, 1),
        "train_tokens_per_second": round(rows / max(learning, 1e-9), 1),
    }


def _follow(done: ReinforceResult, drawn: Drawn, config: ReinforceConfig) -> ReinforceResult:
    """Return the run with what the step's groups say of their levels."""
    taught, solved = teaches(drawn.rollouts, config).tolist(), solved_shares(drawn.rollouts)
    shares = follow(done.shares, config.levels, drawn.levels, taught, solved)
    return replace(done, drawn=(*done.drawn, tuple(drawn.levels)), signal=shares.signal, solved=shares.solved)


def _add(
    done: ReinforceResult, drawn: Drawn, rows: int, learning: float, model: Decoder, further: float
) -> ReinforceResult:
    """Return the run with one more step, which trained on so many rows in so many CPU seconds; see `_further`."""
    rollouts = drawn.rollouts
    rolled = rollouts.prompt_tokens + rollouts.generated_tokens
    per_token = model.config.flops_per_token(rolled / len(rollouts.completions) / 2)
    return replace(
        done,
        steps=done.steps + 1,
        updates=done.updates + (rows > 0),
        generated_tokens=done.generated_tokens + rollouts.generated_tokens,
        trained_tokens=done.trained_tokens + rows,
        rollout_seconds=done.rollout_seconds + drawn.cpu_seconds,
        cpu_seconds=done.cpu_seconds + drawn.cpu_seconds + learning,
        flops=done.flops + per_token * (rolled + (3 + further) * rows),
    )


def _resume(model: Any, optimiser: Any, config: ReinforceConfig, folder: Path) -> ReinforceResult:
    fresh = fresh_shares(config.levels)
    found = load_state(folder / STATE, model, optimiser)
    if found is None:
        return ReinforceResult(signal=fresh.signal, solved=fresh.solved)
    kept = ReinforceConfig.model_validate(found[1]["config"]).model_dump(mode="json")  # newer keys have their defaults
    for key, value in config.model_dump(mode="json").items():
        if kept[key] != value and key not in KEPT:
            raise LiaoyuanError(
                f"{folder} holds a run with {key} = {kept[key]}, not {value}: "
                "give the same value to go on with it, or choose another folder."
            )
    done = result_of(found[1]["done"])
    return done if done.solved else replace(done, solved=fresh.solved)


def result_of(values: dict[str, Any]) -> ReinforceResult:
    """Return the result that `values`, read from JSON, hold; other keys are ignored."""
    known = {key: values[key] for key in ReinforceResult.__dataclass_fields__ if key in values}
    lists = {key: tuple(known[key]) for key in ("signal", "solved") if key in known}
    return ReinforceResult(**known | lists | {"drawn": tuple(tuple(levels) for levels in known["drawn"])})
