"""The tasks that make their problems themselves, by name."""

from collections.abc import Sequence

from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.tasks.addition import Addition
from liaoyuan.tasks.countdown import Countdown
from liaoyuan.tasks.dates import Dates
from liaoyuan.tasks.division import Division
from liaoyuan.tasks.generated import WORDINGS, Generated
from liaoyuan.tasks.letters import Letters
from liaoyuan.tasks.liars import Liars
from liaoyuan.tasks.maze import Maze
from liaoyuan.tasks.modular import Modular
from liaoyuan.tasks.multiplication import Multiplication
from liaoyuan.tasks.ordering import Ordering
from liaoyuan.tasks.problem import Task
from liaoyuan.tasks.sorting import Sorting
from liaoyuan.tasks.subtraction import Subtraction
from liaoyuan.tasks.units import Units
from liaoyuan.tasks.zebra import Zebra

GENERATORS = (
    Addition(),
    Subtraction(),
    Multiplication(),
    Division(),
    Modular(),
    Countdown(),
    Sorting(),
    Letters(),
    Units(),
    Dates(),
    Maze(),
    Liars(),
    Ordering(),
    Zebra(),
)
TASKS: dict[str, Task] = {generator.name: Generated(generator) for generator in GENERATORS}
WORDED: dict[str, Task] = {
    task.name: task for wording in WORDINGS[1:] for task in (Generated(generator, wording) for generator in GENERATORS)
}


def find_task(name: str) -> Task:
    """Return a task by its name: "maze" in the compact notation, "maze-en" in English, "maze-zh" in Chinese.

    Raises:
        LiaoyuanError: there is none of this name; the nearest one is named.
    """
    known = TASKS | WORDED
    if name not in known:
        raise LiaoyuanError(
            f"There is no task '{name}' ({', '.join(TASKS)} exist, each also with -en or -zh){nearest(name, known)}"
        )
    return known[name]


def check_levels(task: Task, levels: Sequence[int], where: str) -> None:
    """Raise LiaoyuanError, naming the setting `where`, if there are no levels or one that the task does not have."""
    wrong = [level for level in levels if level not in task.levels]
    if wrong or not levels:
        raise LiaoyuanError(
            f"{where}: {task.name} has the levels {_words(task.levels)}, not {wrong[0] if wrong else 'none'}."
        )


def _words(levels: Sequence[int]) -> str:
    """Return "2 to 5" where no level between is missing, else all of them."""
    whole = list(levels) == list(range(levels[0], levels[-1] + 1))
    return f"{levels[0]} to {levels[-1]}" if whole and len(levels) > 1 else ", ".join(map(str, levels))
