"""What a study of a task does where its user says nothing else: settings with which SFT leaves RL something to choose.

They were chosen on what SFT alone leaves in seeds that the published studies do not have: of the samples that write
every step well over half are right, and far from all samples do (docs/notes/regime.md). A task that is not here has
the defaults of `StudyConfig`, which are those of addition.
"""

from typing import Any

from liaoyuan.config import Config

Values = dict[str, Any]

_SHORT = {"steps": 80, "validate_every": 10}  # of RL: it has found the better way of thinking long before
TASK_STUDIES: dict[str, Values] = {
    "subtraction": {
        "sft_steps": 450,
        "lesson": {"levels": (2, 3, 4), "solutions": 1200, "hurried": 0.75, "problems": 1000},
        "rl": {"levels": (2, 3, 4), **_SHORT},
        "scratch": False,
    },
    "modular": {
        "sft_steps": 900,
        "lesson": {"levels": (3, 4, 5), "solutions": 2700, "hurried": 0.6, "problems": 1000},
        "rl": {"levels": (3, 4, 5), **_SHORT},
        "scratch": False,
    },
}


def filled_in(values: Values) -> Values:
    """Return the values of a study with those of its task where nothing is given."""
    given = {key: _given(value) for key, value in values.items()}
    lesson = given.get("lesson")
    task = lesson.get("task") if isinstance(lesson, dict) else None
    return _over(TASK_STUDIES.get(task, {}), given) if isinstance(task, str) else values


def _given(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, Config) else value


def _over(beneath: Values, given: Values) -> Values:
    """Return `given` laid over `beneath`, section by section."""
    merged = beneath | given
    for key, value in beneath.items():
        if isinstance(value, dict) and isinstance(given.get(key), dict):
            merged[key] = _over(value, given[key])
    return merged
