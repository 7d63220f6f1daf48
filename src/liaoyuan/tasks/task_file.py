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
from typing import Any

from pydantic import Field

from liaoyuan.config import Config, load, parse
from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks.catalogue import TASKS, check_levels, find_task
from liaoyuan.tasks.parts import Part, PartsTask
from liaoyuan.tasks.problem import Task
from liaoyuan.tasks.reward import Reward, Right


@dataclass(frozen=True)
class Assignment:
    """A task with what its answers earn: `reward` is for learning, `right` says what evaluation counts."""

    task: Task
    reward: Reward

    @property
    def right(self) -> Right:
        return Right(self.task)


class PartConfig(Config):
    """A part of a task file: a generator by its name, which of its levels, and how often it is drawn."""

    task: str = ""
    levels: tuple[int, ...] = ()  # none: all
    weight: float = Field(1.0, gt=0)


class TaskFile(Config):
    """A task file as it is written; parts and rewards are checked one by one, so that errors can name them."""

    name: str = ""  # none: the file's
    parts: tuple[dict[str, Any], ...] = Field(min_length=1)
    rewards: tuple[dict[str, Any], ...] = ()


def open_task(name_or_path: str | Path) -> Assignment:
    """Open a task by its name, or the task file at a path, which ends with `.toml`.

    Raises:
        LiaoyuanError: there is no such task or file, a key or level is unknown, or a part has no problems.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in TASKS and path.exists():
            raise LiaoyuanError(f"{path} is no task file: its name must end with .toml.")
        task = find_task(str(name_or_path))
        return Assignment(task, Right(task))
    if not path.exists():
        raise LiaoyuanError(f"The task file {path} does not exist.")
    file = load(TaskFile, path)
    parts = [_part(values, f"{path}, part {place}") for place, values in enumerate(file.parts, start=1)]
    task = PartsTask(file.name or path.stem, tuple(parts))
    return Assignment(task, Right(task))


def _part(values: dict[str, Any], where: str) -> Part:
    config = parse(PartConfig, values, where)
    task = find_task(config.task)
    check_levels(task, config.levels or task.levels, where)
    return Part(task, tuple(config.levels or task.levels), config.weight)
