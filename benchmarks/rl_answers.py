"""What benchmarks of reinforcement learning share: options, a model's answers to test problems, a cell of a table."""

import argparse
from typing import Any

from liaoyuan.data import Tokenizer
from liaoyuan.evaluation import Answers, measure_accuracy
from liaoyuan.models import Decoder
from liaoyuan.tasks import Right, find_task, held_out_problems
from liaoyuan.tuning.validation import tuning_engine

MEASURES = ("greedy", "sampled")
SAMPLES = 4  # of each test problem, beside the greedy answer


def parser_of(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser of what every such benchmark is told: the start, the task, the seeds, and where it writes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model that every run begins with")
    parser.add_argument("--task", default="addition")
    parser.add_argument("--out", default=out)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of two seeds, to see that it runs")
    parser.add_argument("--json", default="")
    return parser


def answers_of(model: Decoder, tokenizer: Tokenizer, options: dict[str, Any], max_tokens: int) -> Answers:
    """Return how a model answers the test problems; options: `task`, `levels` and `test_problems`."""
    task = find_task(options["task"])
    problems = held_out_problems(task, options["levels"], options["test_problems"])
    engine = tuning_engine(model.eval(), max_tokens)
    return measure_accuracy(engine, tokenizer, Right(task), problems, SAMPLES, max_tokens=max_tokens)


def cell(value: dict[str, float], sign: str = "") -> str:
    """Return an interval in percent; sign: "+" of a difference."""
    mean, low, high = (format(100 * value[key], f"{sign}.1f") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
