"""`liaoyuan rewards test`: how often a reward is wrong."""

import json as json_module
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.evaluation import Rate, Rates
    from liaoyuan.tasks import Assignment, Reward
    from liaoyuan.tasks.rewards.cases import Case

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What answers are worth: test a reward.")


@app.callback()
def rewards() -> None:
    """What answers are worth: test a reward before a model learns from it."""


@app.command("test")
def test(
    task: Annotated[str | None, typer.Option(help="Name of a task, or a task file: answers are made for it.")] = None,
    data: Annotated[Path | None, typer.Option(help="Stands for the `data` of the task file.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Labelled answers of your own (.jsonl): text, gold, right.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="path.py:function, a reward model's folder or a reward's name; else the task's.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="Training problems for which answers are made.")] = 300,
    right_from: Annotated[
        float | None, typer.Option(help="Value from which on an answer is taken for right (1; a reward model: 0.5).")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Misjudged answers to show.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the answers that are made.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how often a reward refuses right answers and takes wrong ones, way by way, with 95% intervals."""
    from liaoyuan.evaluation import rates_of
    from liaoyuan.tasks import open_task
    from liaoyuan.tasks.rewards.cases import read_labelled

    if not task and not answers:
        raise LiaoyuanError("Give --task, for which answers are made, or --answers, a file of labelled ones, or both.")
    assignment = open_task(task, data) if task else None
    tested = _reward(reward, assignment)
    cases = read_labelled(answers) if answers else _made(assignment, problems, seed)
    usual = 0.5 if tested.name == "model" else 1.0
    found = rates_of(tested, cases, usual if right_from is None else right_from)
    if json:
        print(json_module.dumps(_figures(found)))
        return
    for line in _table(found):
        print(line)
    for case, score in found.wrong[:show]:
        verdict = "refused" if case.right else "taken"
        gold, text = case.rollout.problem.answer, case.rollout.text
        print(f"  {verdict} ({case.way}; right: {gold!r}): {text[-100:]!r}{'; ' if score.reason else ''}{score.reason}")
    if len(found.wrong) > show:
        print(f"  and {len(found.wrong) - show:,} more (--show)")


def _reward(name: str | None, assignment: "Assignment | None") -> "Reward":
    from liaoyuan.tasks.rewards import make_reward

    if name is None:
        if assignment is None:
            raise LiaoyuanError("Give --reward, or --task, whose reward is tested.")
        return assignment.right
    if Path(name).is_dir():
        return make_reward("model", {"path": name}, "--reward")
    if ":" in name:
        return make_reward("function", {"path": name}, "--reward")
    return make_reward(name, {}, "--reward")


def _made(assignment: "Assignment | None", count: int, seed: int) -> "list[Case]":
    from liaoyuan.tasks import spread
    from liaoyuan.tasks.data_task import DataTask
    from liaoyuan.tasks.parts import PartsTask
    from liaoyuan.tasks.rewards.cases import cases_of

    assert assignment
    task = assignment.task
    parts = task.parts if isinstance(task, PartsTask) else ()
    files = {part.task.name for part in parts if isinstance(part.task, DataTask)}
    found = {one.key: one for one in spread(task, seed, task.levels, count, "train")}
    return list(cases_of(list(found.values()), lambda problem: problem.task in files, seed))


def _table(rates: "Rates") -> Iterator[str]:
    for right, title in ((True, "Right answers that were refused"), (False, "Wrong answers that were taken")):
        found = [rate for rate in rates.rates if rate.right == right]
        if not found:
            continue
        width = max(len(rate.way) for rate in found)
        yield f"{title}:"
        for rate in [*found, rates.whole(right)]:
            yield f"  {rate.way:{width}}  {_cell(rate)}"
        yield ""


def _cell(rate: "Rate") -> str:
    share = rate.interval
    unjudged = f", {rate.unjudged:,} not judged" if rate.unjudged else ""
    bounds = f"({100 * share.low:.2f} to {100 * share.high:.2f})"
    return f"{rate.wrong:>6,} of {rate.count - rate.unjudged:>7,}  {100 * share.mean:6.2f}% {bounds:>18}{unjudged}"


def _figures(rates: "Rates") -> dict[str, object]:
    def row(rate: "Rate") -> dict[str, object]:
        return {**asdict(rate), "share": rate.interval.to_dict()}

    whole = {"false_negatives": row(rates.whole(True)), "false_positives": row(rates.whole(False))}
    return {**whole, "ways": [row(rate) for rate in rates.rates]}
