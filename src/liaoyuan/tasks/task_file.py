"""Task files: TOML that says of which parts a task consists, and what its answers earn.

[[parts]]
task = "addition"          # a generator; or data = "FILE.jsonl" with its kind
levels = [2, 3, 4]

[[rewards]]
name = "right"
weight = 1.0
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from liaoyuan.config import Config, load, parse
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.tasks.catalogue import TASKS, WORDED, check_levels, find_task
from liaoyuan.tasks.data_task import open_data
from liaoyuan.tasks.parts import Part, PartsTask
from liaoyuan.tasks.problem import Task
from liaoyuan.tasks.reward import Reward, Right
from liaoyuan.tasks.rewards import CHECKS, Mixture, make_reward


@dataclass(frozen=True)
class Assignment:
    """A task with what its answers earn: `reward` is for learning, `right` says what evaluation counts."""

    task: Task
    reward: Reward

    @property
    def right(self) -> Right:
        return Right(self.task)


class PartConfig(Config):
    """A part of a task file: a generator by its name, or the problems of a file.

    task, language: the generator, and the language of its wording (none: the compact notation).
    data, test, kind, skip_bad, check, options, instruction: see `open_data`; paths begin at the task file's folder.
        check: the reward that says what is right, if not the layout's, with its options.
    levels: those that are used (none: all). weight: how often it is drawn beside the other parts.
    """

    task: str = ""
    language: Literal["", "en", "zh"] = ""
    data: Path | None = None
    test: Path | None = None
    kind: str = ""
    skip_bad: bool = False
    check: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    instruction: str = ""
    levels: tuple[int, ...] = ()
    weight: float = Field(1.0, gt=0)


class RewardConfig(Config):
    """A reward of a task file: its name, its weight in the sum; its other keys are its options."""

    name: str
    weight: float = 1.0


class TaskFile(Config):
    """A task file as it is written; parts and rewards are checked one by one, so that errors can name them."""

    name: str = ""  # none: the file's
    parts: tuple[dict[str, Any], ...] = Field(min_length=1)
    rewards: tuple[dict[str, Any], ...] = ()


def open_task(name_or_path: str | Path, data: Path | None = None) -> Assignment:
    """Open a task by its name, or the task file at a path, which ends with `.toml`.

    data: stands for the one `data` that the task file has; where it has none, for the one `test`.

    Raises:
        LiaoyuanError: there is no such task or file, a key or level is unknown, or a part has no problems.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        return _named(str(name_or_path), data)
    if not path.exists():
        raise LiaoyuanError(f"The task file {path} does not exist.")
    file = load(TaskFile, path)
    wheres = [f"{path}, part {place}" for place in range(1, len(file.parts) + 1)]
    configs = [parse(PartConfig, values, where) for values, where in zip(file.parts, wheres, strict=True)]
    if data:
        configs = _with_data(configs, data, path)
    names = _names(configs, file.name or path.stem)
    parts = [_part(*each, path.parent) for each in zip(configs, names, wheres, strict=True)]
    task = PartsTask(file.name or path.stem, tuple(parts))
    return Assignment(task, _reward(task, file.rewards, path))


def _named(name: str, data: Path | None) -> Assignment:
    if name not in TASKS | WORDED and Path(name).exists():
        raise LiaoyuanError(f"{name} is no task file: its name must end with .toml.")
    task = find_task(name)
    if data:
        raise LiaoyuanError(f"The task {name} makes its problems itself, so it has no use for {data}.")
    return Assignment(task, Right(task))


def _with_data(configs: list[PartConfig], data: Path, path: Path) -> list[PartConfig]:
    name = "data" if any(config.data for config in configs) else "test"
    places = [place for place, config in enumerate(configs) if getattr(config, name)]
    if len(places) != 1:
        raise LiaoyuanError(
            f"{path} has {len(places)} parts with `data`: {data} can stand for one only, so edit the file."
        )
    configs[places[0]] = configs[places[0]].model_copy(update={name: data.absolute()})
    return configs


def _names(configs: list[PartConfig], whole: str) -> list[str]:
    """Return a name for each part's problems: that of the only file, or of each one, numbered where two are alike."""
    names: list[str] = []
    for config in configs:
        file = config.data or config.test
        name = (whole if len(configs) == 1 else file.name.partition(".")[0]) if file else config.task
        names.append(name if not file or name not in names else f"{name}-{len(names) + 1}")
    return names


def _part(config: PartConfig, name: str, where: str, folder: Path) -> Part:
    if bool(config.task) == bool(config.data or config.test):
        raise LiaoyuanError(f"{where}: give either `task`, a generator's name, or `data` (or `test`), a file.")
    if config.task:
        _refuse(config, where, ("kind", "skip_bad", "check", "options", "instruction"), "task")
        task = find_task(f"{config.task}-{config.language}" if config.language else config.task)
    else:
        _refuse(config, where, ("language",), "data")
        task = _data_task(config, name, where, folder)
    check_levels(task, config.levels or task.levels, where)
    return Part(task, tuple(config.levels or task.levels), config.weight)


def _refuse(config: PartConfig, where: str, keys: tuple[str, ...], owner: str) -> None:
    for key in keys:
        if getattr(config, key):
            raise LiaoyuanError(f"{where}: `{key}` does not go with `{owner}`.")


def _data_task(config: PartConfig, name: str, where: str, folder: Path) -> Task:
    def find_reward(check: str) -> Reward:
        if check in CHECKS:
            return make_reward(check, config.options, where)
        if check in TASKS | WORDED:
            return Right(find_task(check))
        raise LiaoyuanError(f"{where}: nothing is checked by '{check}' ({', '.join(CHECKS)}){nearest(check, CHECKS)}")

    if config.check:
        find_reward(config.check)  # before the file is read
    data, test = (folder / file if file else None for file in (config.data, config.test))
    return open_data(name, data, test, config.kind, config.skip_bad, config.check, config.instruction, find_reward)


def _reward(task: Task, rewards: tuple[dict[str, Any], ...], path: Path) -> Reward:
    """Return the reward of a file's `[[rewards]]`: whether it is right, if there are none."""
    parts: list[tuple[Reward, float]] = []
    for place, values in enumerate(rewards, start=1):
        where = f"{path}, reward {place}"
        own = parse(RewardConfig, {key: values[key] for key in ("name", "weight") if key in values}, where)
        options = {key: value for key, value in values.items() if key not in ("name", "weight")}
        if own.name in ("function", "model") and "path" in options:
            options["path"] = str(path.parent / str(options["path"]))
        made = _right(task, options, where) if own.name == "right" else make_reward(own.name, options, where)
        parts.append((made, own.weight))
    if not parts:
        return Right(task)
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else Mixture(tuple(parts))


def _right(task: Task, options: dict[str, Any], where: str) -> Right:
    if options:
        raise LiaoyuanError(f"{where}: the reward 'right' has no option '{next(iter(options))}'.")
    return Right(task)
