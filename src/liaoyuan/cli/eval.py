"""`liaoyuan eval`: accuracy of a model on problems with checkable answers."""

import json as json_format
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.process import importing
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.evaluation import Answers, Interval, Line
    from liaoyuan.tasks import Task

USUAL_LEVELS = range(2, 5)  # of a task that makes its problems itself, where none are asked for
COUNTS = ("answers", "unparsed", "unjudged")  # of a line, which add up over ways to answer


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of a model with its tokenizer.")],
    task: Annotated[str, typer.Option(help="Name of a task, or a task file (.toml).")] = "addition",
    data: Annotated[Path | None, typer.Option(help="Stands for the `data` of the task file.")] = None,
    levels: Annotated[str | None, typer.Option(help="Levels of difficulty: '2-4', or '3'.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Test problems at most, spread over the levels.")] = 2000,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each problem.")] = 8,
    pass_at: Annotated[str, typer.Option(help="k of pass@k: '1,4'; none: the number of samples.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer, its thought included.")] = 128,
    fast: Annotated[bool, typer.Option("--fast", help="Answer at once, without a thought.")] = False,
    thinking_budget: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Tokens of a thought; it is closed then. Several: a curve.")
    ] = None,
    quantise: Annotated[str | None, typer.Option(help="Quantise the weights first: int8, int4 or fp8.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    seen: Annotated[bool, typer.Option("--seen", help="Also problems that the model was trained on.")] = False,
    answers: Annotated[Path | None, typer.Option(help="Write every answer with its score here (.jsonl, .zst).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve of several budgets here (.svg).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure accuracy on test problems that no training has seen: greedy, sampled and pass@k, with intervals."""
    with importing():
        import torch

        from liaoyuan.checkpoint import load_model
        from liaoyuan.cli.eval_budgets import draw, ways_of
        from liaoyuan.cli.progress import bar
        from liaoyuan.data import Tokenizer
        from liaoyuan.device import select_device
        from liaoyuan.evaluation import breakdown, measure_accuracy
        from liaoyuan.inference import Engine
        from liaoyuan.models import quantisation_named
        from liaoyuan.tasks import measured_problems, open_task
        from liaoyuan.tasks.seen import refuse_seen

    ks = _ks(pass_at, samples)
    assignment = open_task(task, data)
    asked = measured_problems(assignment.task, _levels(assignment.task, levels), problems)
    known = refuse_seen(model, asked, allow=seen)
    few_bits, tokenizer = quantisation_named(quantise), Tokenizer.load(model)
    loaded = load_model(model, device=select_device().torch, quantisation=few_bits)
    ways = ways_of(tokenizer, loaded, thinking_budget, fast, max_tokens, plot)
    found, engine = {}, Engine(loaded)
    for name, (thinks, sampling) in ways.items():
        arguments = (engine, tokenizer, assignment.right, asked, samples, thinks, seed, max_tokens)
        with bar(f"Answering ({name})" if name else "Answering") as report, torch.inference_mode():
            found[name] = measure_accuracy(*arguments, report, sampling)
    if answers:
        write_answers(answers, found)
    lines = {name: breakdown(one, ks) for name, one in found.items()}
    if known and not json:
        print(f"NOT A TEST: the model was trained on {known:,} of these {len(asked):,} problems.")
    figures = {"task": task, "samples": samples, "seen": known}
    print(json_format.dumps(figures | _figures(lines)) if json else "\n".join(table(lines, ks)))
    if plot:  # last: a curve that cannot be drawn takes no figure with it
        draw(plot, lines, task)


def _levels(task: "Task", text: str | None) -> list[int]:
    """Return the levels that are asked for, or those that are usual."""
    from liaoyuan.cli.levels import read_levels
    from liaoyuan.tasks import check_levels
    from liaoyuan.tasks.parts import PartsTask

    if text is None:
        usual = [level for level in task.levels if level in USUAL_LEVELS and not isinstance(task, PartsTask)]
        return usual or list(task.levels)
    wanted = read_levels(text)
    check_levels(task, wanted, f"--levels {text}")
    return wanted


def _ks(text: str, samples: int) -> list[int]:
    words = [word.strip() for word in text.split(",")] if text else [str(samples)]
    if not all(word.isdigit() and 1 <= int(word) <= samples for word in words):
        raise LiaoyuanError(
            f"--pass-at {text} must be numbers from 1 to {samples}, the --samples, such as '1,{samples}'."
        )
    return sorted({int(word) for word in words})


def table(ways: "dict[str, list[Line]]", ks: list[int]) -> Iterator[str]:
    """Yield the lines of the table as text: of one way to answer all that it breaks down to, of several the whole."""
    (_, lines), *others = ways.items()
    if others:
        lines = [replace(whole, name=name) for name, (whole, *_) in ways.items()]
    width = max(len(line.name) for line in lines)
    heads = "".join(f"{f'pass@{k}':>24}" for k in ks)
    yield f"{'':{width}} {'problems':>9}{'greedy':>24}{'sampled':>24}{heads}{'tokens':>9}"
    for line in lines:
        cells = "".join(f"{_cell(value):>24}" for value in (line.greedy, line.sampled, *line.passes.values()))
        yield f"{line.name:{width}} {line.problems:>9,}{cells}{line.length:>9.1f}"
    wholes = [whole for whole, *_ in ways.values()]
    count, unparsed, unjudged = (sum(getattr(whole, name) for whole in wholes) for name in COUNTS)
    yield f"Of {count:,} answers {unparsed:,} could not be read (wrong), {unjudged:,} not be judged (left out)."


def _cell(value: "Interval | None") -> str:
    if value is None:
        return "-"
    return f"{100 * value.mean:.1f}% ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _figures(ways: "dict[str, list[Line]]") -> dict[str, Any]:
    """Return what `--json` prints of one way to answer, or of several by name."""
    if len(ways) > 1:
        return {"ways": {name: _figures({"": lines}) for name, lines in ways.items()}}
    (lines,) = ways.values()

    def accuracy(line: "Line") -> dict[str, Any]:
        named = {"greedy": line.greedy, "sampled": line.sampled}
        named |= {f"pass_at_{k}": value for k, value in line.passes.items()}
        return {name: value.to_dict() if value else None for name, value in named.items()}

    rows = [{**asdict(line), "accuracy": accuracy(line)} for line in lines]
    for row in rows:
        for name in ("greedy", "sampled", "passes"):
            del row[name]
    whole, *rest = rows
    return {**whole, "breakdown": rest}


def write_answers(path: Path, ways: "dict[str, Answers]") -> None:
    """Write a line for each answer: the question, thought and text, its score and why; of several ways, which one."""
    import zstandard

    from liaoyuan.rundir import write_atomic

    rows = [row | ({"way": name} if name else {}) for name, answers in ways.items() for row in _rows(answers)]
    data = "".join(json_format.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
    write_atomic(path, zstandard.compress(data) if path.suffix == ".zst" else data)


def _rows(answers: "Answers") -> Iterator[dict[str, Any]]:
    pairs = [*zip(answers.rollouts, answers.scores, strict=True)]
    pairs += zip(answers.sampled_rollouts, answers.sampled_scores, strict=True)
    samples = answers.sampled.shape[1]
    for place, (rollout, score) in enumerate(pairs):
        problem, sample = rollout.problem, (place - len(answers.rollouts)) % max(1, samples)
        row = {"problem": problem.key, "task": problem.task, "level": problem.level, "question": problem.question}
        row |= {"gold": problem.answer, "sample": "greedy" if place < len(answers.rollouts) else sample}
        row |= {"thought": rollout.thought, "text": rollout.text, "flaw": rollout.flaw, "tokens": rollout.length}
        row |= {"thought_tokens": rollout.thought_length}
        yield row | {"reward": score.value, "parsed": score.parsed, "reason": score.reason}
