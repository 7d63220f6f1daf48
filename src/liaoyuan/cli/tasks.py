"""`liaoyuan tasks`: which tasks there are, examples of them, and worked solutions to learn from."""

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from liaoyuan.tasks import Problem

app = typer.Typer(
    rich_markup_mode=None,
    help="Tasks whose answers can be checked: list them, show examples, write worked solutions.",
)

Task = Annotated[str, typer.Argument(metavar="TASK", help="Such as maze; maze-en or maze-zh in sentences.")]
Seed = Annotated[int, typer.Option(help="Another one gives other problems.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def overview(context: typer.Context, json: Json = False) -> None:
    """List the tasks with their levels, wordings, and an example of the easiest level."""
    if context.invoked_subcommand:
        return
    from liaoyuan.tasks import TASKS, WORDINGS

    rows: list[dict[str, Any]] = [
        {
            "task": task.name,
            "levels": [task.levels[0], task.levels[-1]],
            "wordings": list(WORDINGS),
            "example": task.problem(0, 0, task.levels[0]).question,
        }
        for task in TASKS.values()
    ]
    if json:
        print(json_format.dumps(rows, ensure_ascii=False))
        return
    width = max(len(row["task"]) for row in rows)
    for row in rows:
        levels = f"{row['levels'][0]}-{row['levels'][1]}"
        print(f"{row['task']:<{width}}  levels {levels}  {_one_line(row['example'])}")
    print("Each also in sentences, English or Chinese: its name with -en or -zh. Examples: liaoyuan tasks show maze-zh")


@app.command()
def show(
    task: Task,
    level: Annotated[int | None, typer.Option(help="Level of difficulty (none: one of each).")] = None,
    count: Annotated[int, typer.Option(min=1, help="Problems of a level.")] = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show problems with a worked solution: question, thought, answer."""
    from liaoyuan.tasks import check_levels, find_task

    chosen = find_task(task)
    levels = list(chosen.levels) if level is None else [level]
    check_levels(chosen, levels, f"--level {level}")
    problems = [chosen.problem(seed, index, one) for one in levels for index in range(count)]
    if json:
        print(json_format.dumps([_fields(problem) for problem in problems], ensure_ascii=False))
        return
    for problem in problems:
        print(f"level {problem.level}")
        for name in ("question", "thought", "answer"):
            text = str(getattr(problem, name)).replace("\n", "\n            ")
            print(f"  {name:<8}  {text}")


@app.command()
def write(
    task: Task,
    out: Annotated[Path, typer.Option(help="File of records, .jsonl or .jsonl.zst.")],
    levels: Annotated[str, typer.Option(help="Levels of difficulty: '2-4', or '3' (none: all).")] = "",
    count: Annotated[int, typer.Option(min=1, help="Worked solutions, evenly over the levels.")] = 600,
    fast_every: Annotated[
        int, typer.Option(min=0, help="Every n-th problem also as an answer without a thought (0: none).")
    ] = 4,
    hurried: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share whose thought leaves the last two steps to the head.")
    ] = 0.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write worked solutions of training problems as records, for `tune sft`."""
    from liaoyuan.cli.levels import read_levels
    from liaoyuan.data import write_records
    from liaoyuan.tasks import check_levels, find_task, solution_records

    chosen = find_task(task)
    wanted = read_levels(levels) if levels else list(chosen.levels)
    check_levels(chosen, wanted, f"--levels {levels}")
    records = solution_records(chosen, wanted, count, seed, fast_every, hurried)
    write_records(out, records)
    different = len({record.id.rpartition("/")[0] for record in records})
    if json:
        print(json_format.dumps({"records": len(records), "problems": different, "out": str(out)}))
    else:
        print(f"{len(records):,} records of {different:,} different problems -> {out}")


def _fields(problem: "Problem") -> dict[str, Any]:
    names: Sequence[str] = ("task", "level", "question", "thought", "answer", "key")
    return {name: getattr(problem, name) for name in names}


def _one_line(text: str) -> str:
    return text.replace("\n", " / ")
