"""Answers of a model as records to learn from: a run folder whose result is `records.jsonl`.

Every answer is drawn as in reinforcement learning and kept with its reward in `rollouts/`, a file a batch; what is
chosen of them is a function of these files alone. So a killed run goes on with the batch that was missing, and another
rule sifts the same answers again.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from liaoyuan.checkpoint import load_model
from liaoyuan.config import Config
from liaoyuan.data import Tokenizer, write_records
from liaoyuan.device import select_device
from liaoyuan.evaluation.accuracy import MAX_TOKENS
from liaoyuan.ops import configure
from liaoyuan.rundir import Lock, Metrics, Progress, Report, read_metrics, remember, silent, write_json
from liaoyuan.tasks import Assignment, check_levels, open_task
from liaoyuan.tasks.rewards import ModelReward, RewardModelConfig
from liaoyuan.training import Stopped, stop_asked
from liaoyuan.training.loop import METRICS
from liaoyuan.tuning.card import name_of
from liaoyuan.tuning.measures import measure_rollouts
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.rejection import Rule, harvest
from liaoyuan.tuning.rollout import Rollouts
from liaoyuan.tuning.rollout_log import FOLDER, RolloutLog, read_rollouts
from liaoyuan.tuning.sources import LocalRollouts

RECORDS = "records.jsonl"
FREE = ("least", "most", "ops.", "device")  # keys that may change when a run goes on: answers are sifted at its end
ALL_BYTES = 2**50  # of rollouts, none of which gives way
SPENT = ("generated_tokens", "cpu_seconds")


class SampleConfig(Config):
    """`model` answers `problems` fresh training problems of the task, `samples` times each.

    most: how many answers to one problem are kept, the best ones (0: all). least: what they are worth at least (None:
        1, which is right, or of a reward model anything).
    """

    model: Path
    task: str = "addition"  # the name of a task, or a task file, whose rewards say what an answer is worth
    data: Path | None = None  # in place of the one file of problems that the task file names
    reward_model: Path | None = None  # which says what an answer is worth, in place of the task's rewards
    levels: tuple[int, ...] = ()  # none: all of the task's
    problems: int = Field(500, gt=0)
    samples: int = Field(8, gt=0)
    most: int = Field(4, ge=0)
    least: float | None = None
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(MAX_TOKENS, gt=0)
    thought_tokens: int = Field(0, ge=0)  # the most of a thought, after which it is closed (0: any)
    batch: int = Field(32, gt=0)  # problems that are answered at once
    seed: int = 0
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen

    @property
    def rule(self) -> Rule:
        return Rule(1.0 if self.least is None and self.reward_model is None else self.least, self.most)

    @property
    def steps(self) -> int:
        return -(-self.problems // self.batch)

    def rollouts(self, levels: tuple[int, ...]) -> ReinforceConfig:
        """Return how answers are drawn, as rollouts know it."""
        names = ("temperature", "top_p", "top_k", "max_tokens", "thought_tokens", "seed")
        drawing = {name: getattr(self, name) for name in names}
        sizes = {"steps": self.steps, "problems": self.batch, "group": self.samples}
        # Samples are not compared, so there may be one alone of a problem.
        return ReinforceConfig.model_validate({"levels": levels, "advantage": "reinforce_pp", **drawing, **sizes})


def run_sample(config: SampleConfig, folder: Path, report: Report = silent) -> dict[str, Any]:
    """Draw what is missing in `folder`, and write the records that the rule keeps; returns `folder/result.json`.

    Raises:
        Stopped: Ctrl-C or SIGTERM came; the same call goes on.
        LiaoyuanError: the model is missing, the task is unknown or lacks a level, or the folder holds a run with other
            settings.
    """
    configure(config.ops)
    assignment = open_task(config.task, config.data)
    levels = tuple(config.levels or assignment.task.levels)
    check_levels(assignment.task, levels, "levels")
    lock = Lock(folder)
    lock.take()
    try:
        remember(config, folder, (folder / FOLDER).exists(), FREE)
        _draw(config, assignment, levels, folder, report)
    finally:
        lock.release()
    return _write(config, folder)


def _draw(config: SampleConfig, assignment: Assignment, levels: tuple[int, ...], folder: Path, report: Report) -> None:
    """Answer the batches that are not there yet."""
    recipe, done = config.rollouts(levels), len(list((folder / FOLDER).glob("*.jsonl.zst")))
    log, metrics = RolloutLog(folder, 1, ALL_BYTES, done), Metrics(folder / METRICS, done)
    with contextlib.closing(metrics), stop_asked() as is_asked:
        source = _source(config, assignment, recipe) if done < config.steps else None
        for step in range(done, config.steps):
            assert source
            first, begin = step * config.batch, time.process_time()
            places = range(first, min(first + config.batch, config.problems))
            rollouts = source.roll_out(step, 0, 0, [levels[place % len(levels)] for place in places])
            spent = _spent(folder, rollouts.generated_tokens, time.process_time() - begin)
            metrics.write(step, **_measures(rollouts, recipe), **spent)
            log.write(step, rollouts, None)  # the last: a batch is done if it is there
            report(Progress(places[-1] + 1, config.problems, "problem", *_line(rollouts)))
            if is_asked() and step + 1 < config.steps:
                raise Stopped(f"Stopped after {places[-1] + 1} problems; the same command goes on from there.")


def _source(config: SampleConfig, assignment: Assignment, recipe: ReinforceConfig) -> LocalRollouts:
    model = load_model(config.model, device=select_device(config.device).torch).eval()
    reward = assignment.reward
    if config.reward_model:
        reward = ModelReward(RewardModelConfig(path=config.reward_model, scale="raw", device=config.device))
    return LocalRollouts(model, Tokenizer.load(config.model), assignment.task, reward, recipe)


def _line(rollouts: Rollouts) -> tuple[str, float | None]:
    rewards = rollouts.rewards[rollouts.judged]
    mean = float(rewards.mean()) if len(rewards) else None
    return "nothing could be judged" if mean is None else f"reward {mean:.3f}", mean


def _spent(folder: Path, generated: int, seconds: float) -> dict[str, Any]:
    """Return what the run has spent with one more batch, killed and resumed parts together."""
    last = (read_metrics(folder / METRICS) or [{}])[-1]
    more = {"generated_tokens": generated, "cpu_seconds": seconds}
    return {name: round(last.get(name, 0) + more[name], 3) for name in SPENT}


def _measures(rollouts: Rollouts, recipe: ReinforceConfig) -> dict[str, Any]:
    """Return the measures of rollouts that do not say what a reward teaches."""
    learning = ("no_signal", "all_right", "all_wrong")
    return {name: value for name, value in measure_rollouts(rollouts, recipe).items() if name not in learning}


def _write(config: SampleConfig, folder: Path) -> dict[str, Any]:
    """Sift all that was drawn, and write what is kept and what became of the rest."""
    rows = (row for path in sorted((folder / FOLDER).glob("*.jsonl.zst")) for row in read_rollouts(path))
    found = harvest(rows, config.rule, name_of(config.model))
    write_records(folder / RECORDS, found.records)
    levels = {str(level): counts for level, counts in found.levels.items()}
    spent = read_metrics(folder / METRICS)[-1]
    result = {"records": len(found.records), **{name: spent[name] for name in SPENT}, "levels": levels}
    write_json(folder / "result.json", result)
    return result
