"""Whether SFT has left RL something to choose: told level by level, by the way in which samples think."""

from pathlib import Path

from liaoyuan.rundir import silent
from liaoyuan.tasks import Rollout, find_task
from liaoyuan.tuning.stages import Lesson
from liaoyuan.tuning.start_check import bounds, finding_of, look_at_start, ways
from tests.tuning.test_study_run import QUICK

LESSON = Lesson(task="subtraction", levels=(3,), solutions=40, hurried=0.5)


def samples(careful: int, careful_right: int, hasty: int, hasty_right: int) -> tuple[list[Rollout], list[bool]]:
    problem = find_task("subtraction").problem(0, 0, 3)
    answers = [Rollout(problem, problem.thought, "")] * careful + [Rollout(problem, problem.steps[0], "")] * hasty
    right = [place < careful_right for place in range(careful)] + [place < hasty_right for place in range(hasty)]
    return answers, right


def told(*counts: int) -> str:
    found = finding_of(ways(*samples(*counts), bounds(LESSON)))
    return str(found) if found else ""


def test_a_start_whose_careful_samples_are_right_at_times_is_left_alone() -> None:
    assert told(20, 7, 80, 0) == ""


def test_a_start_with_no_way_that_is_right_in_a_third_is_told() -> None:
    assert "level 3 (30%)" in told(20, 6, 80, 8) and "study.lesson.solutions" in told(20, 6, 80, 8)


def test_a_way_that_hardly_any_sample_takes_does_not_count() -> None:
    assert "level 3 (0%)" in told(1, 1, 99, 0)


def test_one_way_alone_is_enough_if_it_is_right() -> None:
    assert told(100, 40, 0, 0) == "" and told(0, 0, 100, 40) == "" and told(0, 0, 100, 30)


def test_a_solution_that_leaves_fewer_steps_out_than_another_is_still_a_short_one() -> None:
    lesson = Lesson(task="modular", levels=(5,), solutions=200, hurried=0.6)
    problem = find_task("modular").problem(0, 0, 5)
    thoughts = ["7*3=1", "7*3=1+8=9-5=4", "7*3=1+8=9-5=4*2=8+9=7"]
    found = ways([Rollout(problem, thought, "") for thought in thoughts], [False, False, True], bounds(lesson))[5]
    assert found["long"] == {"share": 1 / 3, "right": 1.0} and found["short"] == {"share": 2 / 3, "right": 0.0}


def test_where_all_solutions_are_whole_there_is_one_way() -> None:
    whole = LESSON.model_copy(update={"hurried": 0.0})
    assert ways(*samples(10, 5, 0, 0), bounds(whole))[3]["long"] == {"share": 1.0, "right": 0.5}


def test_what_is_told_is_kept_with_its_figures(model_folder: Path, tmp_path: Path) -> None:
    found = look_at_start(tmp_path, silent, QUICK.lesson, str(model_folder))
    assert set(found["ways"]) == {"1"} and {"long", "short"} == set(found["ways"]["1"])
    assert "level 1" in found["finding"]
