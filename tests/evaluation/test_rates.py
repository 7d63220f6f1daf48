"""How often shipped rewards are wrong on real problems, beside what others' checkers say of the same answers."""

import os
import re
from pathlib import Path

import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation.rates import Rates, rates_of, wilson
from liaoyuan.tasks import Problem, Right, Rollout, Score, find_task, open_task, score_all, spread
from liaoyuan.tasks.rewards import NumberReward
from liaoyuan.tasks.rewards.cases import Case, cases_of, read_labelled

SHARED = Path(os.environ.get("LIAOYUAN_DATA", Path(__file__).parents[3] / "shared" / "data"))
SETS = {  # file: problems, share of right answers that may be refused
    "reason/gsm8k_train": (80, 0.0),
    "reason/ape210k_valid_zh": (80, 0.0),
    "reason/math_train4500": (12, 0.01),
    "reason/tal_scq_en_train": (80, 0.003),
    "reason/tal_scq_zh_train": (80, 0.003),
    "reason/strategyqa_train": (40, 0.0),
    "reason/folio_train": (40, 0.0),
}


def real(name: str, tmp_path: Path, count: int) -> tuple[Right, list[Case]]:
    path = SHARED / f"{name}.jsonl.zst"
    if not path.exists():
        pytest.skip(f"the real data are not at {SHARED}")
    skip = "skip_bad = true" if "tal_scq_zh" in name else ""  # as its task file says: six of its rows have one option
    (tmp_path / "t.toml").write_text(f'[[parts]]\ndata = "{path}"\n{skip}\n', encoding="utf-8")
    assignment = open_task(tmp_path / "t.toml")
    problems = spread(assignment.task, 3, assignment.task.levels, count, "train")
    return assignment.right, list(cases_of(problems, lambda _: True, seed=1))


@pytest.mark.parametrize("name", SETS)
def test_no_wrong_answer_is_taken_and_hardly_a_right_one_refused(name: str, tmp_path: Path) -> None:
    count, refused = SETS[name]
    right, cases = real(name, tmp_path, count)
    rates = rates_of(right, cases)
    assert rates.whole(False).wrong == 0, rates.wrong
    assert rates.whole(True).interval.mean <= refused, rates.wrong
    assert rates.whole(True).unjudged == 0


def test_numbers_are_judged_as_lm_eval_does_where_it_reads_them(tmp_path: Path) -> None:
    """Its strict filter for GSM8K takes what follows the first ####, up to the first other character."""
    right, cases = real("reason/gsm8k_train", tmp_path, 60)
    marked = [case for case in cases if re.fullmatch(r"[^#]*#### -?[0-9.,]+", case.rollout.text)]
    assert len(marked) > 200
    for case, score in zip(marked, score_all([right], [case.rollout for case in marked])[0], strict=True):
        found = re.search(r"#### (\-?[0-9\.\,]+)", case.rollout.text)
        assert found
        theirs = found[1].replace(",", "").rstrip(".") == case.rollout.problem.answer.replace(",", "")
        assert score.is_right == (theirs or _float(found[1]) == _float(case.rollout.problem.answer))


def test_mathematics_that_lm_eval_calls_equal_is_right(tmp_path: Path) -> None:
    equal = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils").is_equiv
    right, cases = real("reason/math_train4500", tmp_path, 12)
    boxed = [(case, re.fullmatch(r"\\boxed\{(.*)\}", case.rollout.text, re.DOTALL)) for case in cases]
    pairs = [(case, match[1]) for case, match in boxed if match and "\\boxed" not in match[1]]
    scores = score_all([right], [case.rollout for case, _ in pairs])[0]
    taken = [equal(answer, case.rollout.problem.answer) for case, answer in pairs]
    assert sum(taken) > 3 and len(taken) - sum(taken) > 30
    for (case, answer), score, theirs in zip(pairs, scores, taken, strict=True):
        if theirs and case.right:
            assert score.is_right, (answer, case.rollout.problem.answer)
        if score.is_right:
            assert case.right, (answer, case.rollout.problem.answer)


def test_a_lenient_reward_is_found_out(tmp_path: Path) -> None:
    class Contains:
        name = "contains"

        def __call__(self, rollout: Rollout) -> Score:
            return Score(float(rollout.problem.answer in rollout.text))

    _, cases = real("reason/gsm8k_train", tmp_path, 20)
    rates = rates_of(Contains(), cases)
    ways = {rate.way: rate for rate in rates.rates if not rate.right}
    assert ways["one or the other"].interval.mean == 1.0 and ways["denied"].interval.mean == 1.0
    assert rates.whole(False).interval.low > 0.4


def test_tasks_that_take_the_answer_alone_are_tested_on_that() -> None:
    task = find_task("addition")
    cases = list(cases_of(spread(task, 0, (2, 3), 40, "train"), lambda _: False))
    rates = rates_of(Right(task), cases)
    assert rates.whole(True).wrong == rates.whole(False).wrong == 0
    assert {rate.way for rate in rates.rates if rate.right} == {"alone", "with spaces around"}


def test_what_is_not_judged_is_counted_apart() -> None:
    problem = Problem("n", "How many?", "many", "", 0, "k")
    cases = [Case(Rollout(problem, "", "many"), True, "alone"), Case(Rollout(problem, "", "few"), False, "other")]
    rates: Rates = rates_of(NumberReward(), cases)
    assert rates.whole(True).unjudged == rates.whole(False).unjudged == 1
    assert rates.whole(True).interval.high == 1.0 and len(rates.unjudged) == 2 and not rates.wrong


def test_wilsons_interval() -> None:
    """Against the figures of Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(hits, count)
        assert (found.low, found.high) == pytest.approx((low, high), abs=2e-4)


def test_labelled_answers_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"gold": "42", "text": "#### 42", "right": true}\n\n{"gold": "42", "text": "1", "right": false}\n')
    cases = read_labelled(path)
    assert [case.right for case in cases] == [True, False]
    assert rates_of(NumberReward(), cases).wrong == ()
    for line, message in (
        ('{"text": "1"}', "'right' is missing in .*line 1"),
        ('{"text": "1", "rigth": true}', "did you mean 'right'"),
        ("{", "line 1: this is no JSON"),
        ("", "no labelled answers"),
    ):
        path.write_text(line)
        with pytest.raises(LiaoyuanError, match=message):
            read_labelled(path)


def _float(text: str) -> float:
    return float(text.replace(",", "").rstrip("."))
