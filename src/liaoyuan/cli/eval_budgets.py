"""How `liaoyuan eval` lets a model think: at once, freely, within a budget of tokens, or all of these for a curve."""

from collections.abc import Sequence
from pathlib import Path

from liaoyuan import report
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import Interval, Line
from liaoyuan.inference import AfterThinking, Grammars, SamplingParams, ThinkMarks
from liaoyuan.models import Decoder
from liaoyuan.report import Text
from liaoyuan.rundir import write_atomic

FAST, FREE = "fast", "any"  # the ways of a curve that have no budget: without a thought, and one of any length

Way = tuple[bool, SamplingParams | None]  # whether it thinks, and how the thought is held to its budget


def ways_of(
    tokenizer: Tokenizer, model: Decoder, budgets: str | None, fast: bool, max_tokens: int, plot: Path | None
) -> dict[str, Way]:
    """Return the ways to answer by name: one without a name, or those of a curve, fewest tokens first.

    Raises:
        LiaoyuanError: the budgets are no numbers, leave no room for the answer, or there are no thoughts to hold.
    """
    if budgets is None:
        ways: dict[str, Way] = {"": (not fast, None)}
    else:
        numbers = _numbers(budgets, max_tokens)
        ways = {str(number): (True, _held(tokenizer, model, number, fast)) for number in numbers}
        ways = {FAST: (False, None), **ways, FREE: (True, None)} if len(ways) > 1 else {"": ways[str(numbers[0])]}
    if plot and len(ways) == 1:
        raise LiaoyuanError("--plot draws accuracy by budget: give several, such as --thinking-budget 0,8,16,32.")
    return ways


def _numbers(text: str, max_tokens: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise LiaoyuanError(f"--thinking-budget {text} must be a number of tokens, or several: 0,8,16,32.")
    numbers = sorted({int(word) for word in words})
    if numbers[-1] + 1 >= max_tokens:
        raise LiaoyuanError(
            f"--thinking-budget {numbers[-1]} leaves no room for the answer: give --max-tokens more than "
            f"{numbers[-1] + 1}."
        )
    return numbers


def _held(tokenizer: Tokenizer, model: Decoder, budget: int, fast: bool) -> SamplingParams:
    """Return how thoughts are held to their budget."""
    if fast or tokenizer.think_ids is None:
        why = "--fast asks for none" if fast else "this model's tokenizer has no marks of thoughts"
        raise LiaoyuanError(f"--thinking-budget is for a thought, but {why}.")
    vocabulary = Grammars(tokenizer, model.config.vocab_size, tokenizer.eos_ids).vocabulary
    return SamplingParams(constraint=AfterThinking(None, ThinkMarks(*tokenizer.think_ids), vocabulary, budget))


def draw(path: Path, ways: dict[str, list[Line]], task: str) -> None:
    """Draw accuracy over the budgets, with intervals; what it is without a thought, and with any, as level lines.

    Raises:
        LiaoyuanError: no answer could be judged.
    """
    whole = {name: lines[0] for name, lines in ways.items()}
    budgets = [name for name in whole if name not in (FAST, FREE)]
    ends = [budgets[0], budgets[-1]]
    curves = [
        _curve(Text("greedy", "贪心"), budgets, [whole[one].greedy for one in budgets], 0),
        _curve(Text("sampled", "采样"), budgets, [whole[one].sampled for one in budgets], 1),
        _curve(Text("without a thought, greedy", "不思考，贪心"), ends, [whole[FAST].greedy] * 2, 4),
        _curve(Text("a thought of any length, greedy", "思考不限长，贪心"), ends, [whole[FREE].greedy] * 2, 2),
    ]
    if not all(len(curve.x) for curve in curves):
        raise LiaoyuanError(f"{path} was not drawn: of some budget no answer could be judged.")
    drawing = report.Lines(
        Text("most tokens of a thought", "思考的最多词元数"), Text("% right", "正确率 %"), curves, percent=True
    )
    title = Text(f"{task}: accuracy by thinking budget", f"{task}：按思考预算的正确率")
    write_atomic(path, report.picture(report.Plot(title, drawing)))


def _curve(name: Text, budgets: Sequence[str], values: Sequence[Interval | None], colour: int) -> report.Line:
    known = [(int(budget), value) for budget, value in zip(budgets, values, strict=True) if value]
    means, lows, highs = ([getattr(value, end) for _, value in known] for end in ("mean", "low", "high"))
    return report.Line(name, [budget for budget, _ in known], means, lows, highs, colour)
