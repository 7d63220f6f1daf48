"""A study's lesson: its worked solutions can be hurried, for any task, and its problems do not change by that."""

from liaoyuan.data import Tokenizer
from liaoyuan.tuning.stages import Lesson


def test_hurried_solutions_are_shorter_and_answer_the_same_problems(tokenizer: Tokenizer) -> None:
    whole = Lesson(task="division-zh", levels=(3,), solutions=40, fast_every=0)
    hurried = whole.model_copy(update={"hurried": 0.75})
    lengths = [[len(one.tokens) for one in lesson.worked_solutions(tokenizer)] for lesson in (whole, hurried)]
    shorter = sum(short < long for long, short in zip(*lengths, strict=True))
    assert 20 <= shorter < 40 and all(short <= long for long, short in zip(*lengths, strict=True))
    assert whole.test()[:5] == hurried.test()[:5]
