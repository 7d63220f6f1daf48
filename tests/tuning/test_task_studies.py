"""A study of a task has the settings that suit it, unless its user says otherwise; other tasks have the defaults."""

import pytest

from liaoyuan.tasks import check_levels, find_task
from liaoyuan.tuning import ReinforceConfig, StudyConfig
from liaoyuan.tuning.stages import Lesson
from liaoyuan.tuning.task_studies import TASK_STUDIES


def test_what_is_given_counts_and_the_rest_suits_the_task() -> None:
    plain = StudyConfig.model_validate({"lesson": {"task": "subtraction"}})
    assert (plain.lesson.levels, plain.lesson.hurried, plain.sft_steps) == ((2, 3, 4), 0.75, 450)
    values = {"lesson": {"task": "subtraction", "hurried": 0.0}, "rl": {"steps": 7}, "sft_steps": 9}
    given = StudyConfig.model_validate(values)
    assert (given.lesson.hurried, given.rl.steps, given.sft_steps) == (0.0, 7, 9)
    assert given.lesson.solutions == plain.lesson.solutions and given.rl.validate_every == plain.rl.validate_every


def test_sections_given_as_objects_are_filled_in_the_same() -> None:
    lesson, rl = Lesson(task="modular", solutions=5), ReinforceConfig(group=16)
    found = StudyConfig(lesson=lesson, rl=rl)
    assert found == StudyConfig.model_validate({"lesson": {"task": "modular", "solutions": 5}, "rl": {"group": 16}})
    assert found.lesson.levels == found.rl.levels == (3, 4, 5)
    assert (found.lesson.solutions, found.rl.group) == (5, 16)


def test_a_resolved_study_is_read_as_it_was_written() -> None:
    resolved = StudyConfig.model_validate({"lesson": {"task": "modular"}, "rl": {"levels": (2,)}})
    assert StudyConfig.model_validate(resolved.model_dump(mode="json")) == resolved


def test_other_tasks_have_the_defaults() -> None:
    assert StudyConfig(lesson=Lesson(task="division")).model_dump(exclude={"lesson"}) == StudyConfig().model_dump(
        exclude={"lesson"}
    )


@pytest.mark.parametrize("task", TASK_STUDIES)
def test_every_entry_is_a_study_of_levels_that_the_task_has(task: str) -> None:
    found = StudyConfig.model_validate({"lesson": {"task": task}})
    assert found.lesson.levels == found.rl.levels and found.lesson.max_tokens == found.rl.max_tokens
    check_levels(find_task(task), found.lesson.levels, task)
