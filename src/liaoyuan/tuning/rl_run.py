"""A user's own reinforcement learning: a run folder whose result is `model`, or `adapter`, with what it has gained.

With a teacher it is on-policy distillation, which differs in what is learned from a rollout and in nothing else.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from liaoyuan.checkpoint import load_model
from liaoyuan.config import Config
from liaoyuan.data import Tokenizer, read_records, write_records
from liaoyuan.device import select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import require_exact
from liaoyuan.models import Decoder
from liaoyuan.ops import configure
from liaoyuan.rundir import Report, atomic_folder, read_json, remember, silent, write_json
from liaoyuan.tasks import Right, Task, check_levels, held_out_problems, open_task, spread, to_record
from liaoyuan.tasks.seen import Seen, read_seen, seen_among, write_seen
from liaoyuan.tuning.card import Card, sources_of, write_card
from liaoyuan.tuning.gain import Exam, gain
from liaoyuan.tuning.held_out import HELD_OUT
from liaoyuan.tuning.lora import LoraConfig, Method
from liaoyuan.tuning.recipe import KEPT, ReinforceConfig
from liaoyuan.tuning.reinforce import reinforce
from liaoyuan.tuning.start import Start, refuse_whole
from liaoyuan.tuning.teacher import open_teacher
from liaoyuan.tuning.validation import Best

ADAPTER_RATE = 4e-3  # of adapters, where none is given; docs/rl.md has the sweep

# Of `rl`, where a teacher is given: its word alone, and of all answers, for none is better than another.
DISTILLATION = {"advantage": "none", "teacher_weight": 1.0, "group": 4, "update_group": 4}
START = "start.json"  # in the run folder: what the model that it began with reached on the validation problems
FREE = (*(f"rl.{key}" for key in KEPT), "exact", "ops.", "device")  # keys that may change when a run goes on


class RlConfig(Config):
    """`model` to begin with, the task, how to reinforce, and how many problems choose the checkpoint and measure it.

    method: "full" trains every weight, "lora", "rslora" and "dora" adapters alone.
    teacher: a model of the same vocabulary; then `rl` is `DISTILLATION` but for what is given.
    """

    model: Path
    teacher: Path | None = None
    task: str = "addition"  # the name of a task, or a task file
    data: Path | None = None  # in place of the one file of problems that the task file names
    method: Method = "full"
    lora: LoraConfig = LoraConfig()
    rl: ReinforceConfig = ReinforceConfig()
    validation_problems: int = Field(200, gt=0)
    test_problems: int = Field(500, ge=0)  # on which the result is compared with `model` at the end (0: it is not)
    test_samples: int = Field(8, gt=0)  # of each
    device: str = "auto"
    ops: dict[str, str] = Field(default_factory=dict)  # kernels, where not those chosen
    exact: bool = False  # no run unless rollouts have training's bits; where no compiler is, that takes slower kernels

    @property
    def start(self) -> Start:
        return Start(self.model, self.method, self.lora, self.rl.seed)

    @model_validator(mode="before")
    @classmethod
    def _with_teacher(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("teacher") is None:
            return values
        given = values.get("rl", {})
        given = given.model_dump(exclude_unset=True) if isinstance(given, ReinforceConfig) else given
        return values | {"rl": DISTILLATION | given} if isinstance(given, dict) else values

    @model_validator(mode="after")
    def _needs_teacher(self) -> "RlConfig":
        if self.teacher is None and (self.rl.teacher_weight or self.rl.teacher_loss == "whole"):
            raise ValueError(
                "rl.teacher_weight and rl.teacher_loss are of what a teacher thinks, and there is none: give teacher, "
                "a folder"
            )
        return self


def run_rl(config: RlConfig, folder: Path, report: Report = silent) -> dict[str, Any]:
    """Reinforce and export the best checkpoint as `folder/model` or `folder/adapter`; goes on from what is in `folder`.

    The model that it began with is one of the checkpoints. What is returned is also `folder/result.json`.

    Raises:
        LiaoyuanError: the model is missing or wrong, the task is unknown or lacks a level, the folder holds a run with
            other settings, a setting does not go with adapters, or the model is not exact and must be.
    """
    configure(config.ops)
    assignment, tokenizer = open_task(config.task, config.data), Tokenizer.load(config.model)
    task = assignment.task
    config = config.model_copy(update={"rl": _resolved(config, task)})
    check_levels(task, config.rl.levels, "rl.levels")
    remember(config, folder, (folder / START).exists(), FREE)
    problems = spread(task, 7, config.rl.levels, config.validation_problems, "validation")
    best = Best(tokenizer, config.start, Right(task), problems, folder, config.rl.max_tokens)
    write_records(folder / HELD_OUT, [to_record(problem) for problem in problems])
    device = select_device(config.device).torch
    teacher = open_teacher(config.teacher, config.model, device) if config.teacher else None
    model = config.start.load(device)
    if config.exact:
        require_exact(model.eval())
    start = _measure_start(model, best, folder)
    for known in filter(None, (config.model, config.teacher)):  # what a teacher knows by heart it passes on
        Seen(folder, known)
    rewarded = (assignment.reward, config.exact, config.start, teacher)
    done = reinforce(model, tokenizer, task, config.rl, folder, report, best, None, *rewarded)
    del model
    result = folder / config.start.name
    with atomic_folder(result) as part:
        shutil.copytree(best.model_folder, part, dirs_exist_ok=True)
        write_seen(part, read_seen(folder))
    figures = {name: value for name, value in asdict(done).items() if isinstance(value, int | float)}
    figures |= {"validation": best.value, "validation_start": start}
    figures |= _compare(config, task, tokenizer, folder, report)
    write_card(result, _card(config, folder, figures))
    write_json(folder / "result.json", figures)
    return figures


def _card(config: RlConfig, folder: Path, figures: dict[str, Any]) -> Card:
    """Return the card: what was asked is made by the task, or comes from its files."""
    known = ("validation", "test_problems", "test_problems_seen")
    scores: dict[str, Any] = {key: figures[key] for key in known if key in figures}
    accuracy = figures.get("accuracy", {})
    scores |= {key: accuracy[key] for key in ("model", "difference") if key in accuracy}
    start = {"validation": figures["validation_start"]} | ({"test": accuracy["start"]} if accuracy else {})
    teacher = {"the teacher": {"test": accuracy["teacher"]}} if "teacher" in accuracy else {}
    notes = [] if accuracy else ["It was not compared with the model it began with on test problems."]
    verb, how = "rl", "reinforcement learning"
    if config.teacher:
        verb, how = "distill", f"on-policy distillation from {config.teacher}"
    names = [name for name in (config.rl.advantage, config.method) if name != "none"]
    return Card(
        title=folder.name,
        relation=config.start.relation,
        base=config.model,
        method=f"{how} on {config.task} ({', '.join(names)})",
        command=f"liaoyuan tune {verb} {folder / 'config.toml'} --out {folder}",
        config=config.model_dump(mode="json", exclude_none=True),
        scores=scores,
        controls={"the model that was begun with": start, **teacher},
        data=sources_of(read_records(folder / HELD_OUT), "asked"),
        notes=notes,
    )


def _compare(config: RlConfig, task: Task, tokenizer: Tokenizer, folder: Path, report: Report) -> dict[str, Any]:
    """Compare the result with `config.model` on test problems, of which those that it was trained on are left out."""
    if not config.test_problems:
        return {}
    drawn = held_out_problems(task, config.rl.levels, config.test_problems)
    known = {problem.key for problem in seen_among(drawn, read_seen(folder))}
    asked = [problem for problem in drawn if problem.key not in known]
    found: dict[str, Any] = {"test_problems": len(asked), "test_problems_seen": len(drawn) - len(asked)}
    if not asked:
        return found
    exam = Exam(Right(task), asked, config.test_samples, config.rl.max_tokens)
    models: dict[str, Callable[[], Decoder]] = {
        "start": config.start.base,
        **({"teacher": partial(load_model, config.teacher)} if config.teacher else {}),
        "model": partial(config.start.trained, folder / config.start.name),
    }
    return found | {"accuracy": gain(exam, models, tokenizer, folder, report)}


def _resolved(config: RlConfig, task: Task) -> ReinforceConfig:
    """Return the config with what follows from the task and the method: all of its levels, where none were given and it
    lacks one of the usual ones, and the rate of adapters.

    Raises:
        LiaoyuanError: a setting does not go with adapters.
    """
    rl, given, filled = config.rl, config.rl.model_fields_set, dict[str, Any]()
    if "levels" not in given and not set(rl.levels) <= set(task.levels):
        filled["levels"] = tuple(task.levels)
    if config.start.has_adapters:
        refuse_whole(rl.optimiser, "rl")
        if rl.advantage == "gae":
            raise LiaoyuanError("rl.advantage = 'gae' is for whole weights: a critic is a trunk of its own.")
        if config.lora.dropout:
            raise LiaoyuanError(
                "lora.dropout is not for RL: what is trained would not be what rolled out. Set it to 0."
            )
        if "learning_rate" not in given:
            filled["learning_rate"] = ADAPTER_RATE
    return rl.model_copy(update=filled)


def _measure_start(model: Decoder, best: Best, folder: Path) -> float:
    """Let the model that the run begins with be the first checkpoint; return its value."""
    if not (folder / START).exists():
        best(model.eval())
        write_json(folder / START, {"value": best.value})
    return float(read_json(folder / START)["value"])
