"""A user's own function is called with what it asks for, and ended when it takes too long."""

import gc
import os
import time
from pathlib import Path

import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.tasks import Problem, Rollout
from liaoyuan.tasks.rewards.function import FunctionConfig, FunctionReward

PROBLEM = Problem("own", "Say please.", "please", "", 3, "k")
SOURCE = """
import os, sys, time

print("this is printed when it is loaded")


def polite(text, gold):
    print("and this while it works")
    return 1.0 if gold in text else 0.0


def reasoned(question, text, thought, level, task, length, flaw, gold):
    return len(text) + level, f"{task}: {question} {thought} {length} {flaw}"


def moody(text):
    if text == "raise":
        raise ValueError("no such mood")
    if text == "sleep":
        time.sleep(600)
    if text == "die":
        os._exit(1)
    if text == "exit":
        sys.exit(3)
    if text == "none":
        return None
    if text == "nan":
        return float("nan")
    if text == "word":
        return "good"
    return True


def greedy(txt):
    return 0.0


VALUE = 3
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def reward(path: Path, name: str, **options: object) -> FunctionReward:
    return FunctionReward(FunctionConfig(path=f"{path}:{name}", **options))  # type: ignore[arg-type]


def rollout(text: str) -> Rollout:
    return Rollout(PROBLEM, "hm", text, "", 7)


def test_it_is_called_with_what_it_names(source: Path) -> None:
    polite = reward(source, "polite")
    assert [score.value for score in polite.score_all([rollout("please"), rollout("now")])] == [1.0, 0.0]
    score = reward(source, "reasoned")(rollout("four"))
    assert score.value == 7.0 and score.reason == "own: Say please. hm 7 "


def test_what_fails_has_no_value_and_says_why(source: Path) -> None:
    moody = reward(source, "moody", seconds=1.0, failures=1.0)
    texts = ("fine", "raise", "die", "exit", "none", "nan", "word", "sleep", "fine")
    scores = moody.score_all([rollout(text) for text in texts])
    assert [score.value for score in scores] == [1.0, None, None, None, None, None, None, None, 1.0]
    reasons = dict(zip(texts, (score.reason for score in scores), strict=True))
    assert "ValueError: no such mood (line" in reasons["raise"]
    assert "died" in reasons["die"] and "over 1 s" in reasons["sleep"]
    assert "nan" in reasons["nan"] and "could not convert" in reasons["word"]
    assert moody.count.calls == 9 and moody.count.failed == 6  # None is its own verdict


def test_a_path_from_here_is_as_good(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    score = FunctionReward(FunctionConfig(path=f"{source.name}:moody"))(rollout("raise"))
    assert "no such mood (line" in score.reason


def test_too_many_failures_stop_the_run(source: Path) -> None:
    moody = reward(source, "moody", failures=0.2)
    moody.score_all([rollout("fine")] * 30 + [rollout("raise")] * 7)
    with pytest.raises(LiaoyuanError, match=r"failed for 8 of 38 answers \(lastly: ValueError: no such mood"):
        moody(rollout("raise"))


@pytest.mark.parametrize("workers", [1, 2])
def test_after_too_many_failures_no_more_answers_are_judged(tmp_path: Path, workers: int) -> None:
    asked, source = tmp_path / "asked", tmp_path / "own.py"
    lines = ("def bad(text):", f"    open({str(asked)!r}, 'a').write('x')", "    while True: pass")
    source.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(LiaoyuanError, match="failed for 20 of 20 answers"):
        reward(source, "bad", workers=workers, seconds=0.05).score_all([rollout("")] * 1000)
    assert 20 <= len(asked.read_text()) < 100


def test_several_processes_give_the_same_in_the_same_order(source: Path) -> None:
    rollouts = [rollout(text) for text in ("please", "no", "yes please", "") * 5]
    assert reward(source, "polite", workers=2).score_all(rollouts) == reward(source, "polite").score_all(rollouts)


def test_its_process_ends_with_it(source: Path) -> None:
    polite = reward(source, "polite")
    worker = polite._workers._idle.get()
    process = worker._process
    assert process is not None and process.poll() is None
    del polite, worker
    gc.collect()
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        os.sched_yield()
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}:polit", "did you mean 'polite'"),
        ("{}:greedy", "wants 'txt'.*did you mean 'text'"),
        ("{}:VALUE", "cannot be loaded"),
        ("{}", "must look like path.py:function"),
        ("nowhere.py:f", "does not exist"),
        ("own.txt:f", "must look like"),
    ],
)
def test_what_cannot_be_called_is_refused_at_the_door(source: Path, path: str, message: str) -> None:
    with pytest.raises(LiaoyuanError, match=message):
        FunctionReward(FunctionConfig(path=path.format(source)))


def test_a_file_that_does_not_load_is_named_with_its_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ny = 1 / 0\n", encoding="utf-8")
    with pytest.raises(LiaoyuanError, match=r"ZeroDivisionError.*line 2"):
        FunctionReward(FunctionConfig(path=f"{broken}:f"))
