"""`liaoyuan tune study`: does reinforcement learning bring more than the same compute spent otherwise?"""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

LEVELS = ("study.lesson.levels", "study.rl.levels")  # what --levels sets


def study(
    model: Annotated[Path, typer.Option(help="Folder of the model to begin with, with its tokenizer.")],
    task: Annotated[str | None, typer.Option(help="Task that is taught and measured; else addition.")] = None,
    levels: Annotated[
        str | None, typer.Option(help="Levels of difficulty: '2-4', or '3'; else those that suit the task.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repeat it all with other worked solutions and draws; else 3 times.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder; the same command goes on from what is there.")] = Path(
        "runs/study"
    ),
    run_file: Annotated[Path | None, typer.Option("--config", help="TOML file with further settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As study.rl.steps=60; see docs/tune.md.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json instead of a table.")] = False,
) -> None:
    """SFT, then RL beside two controls of its compute: more SFT, and SFT on own right answers."""
    from rich.console import Console

    from liaoyuan.cli.levels import read_levels
    from liaoyuan.cli.process import tune_allocator
    from liaoyuan.cli.progress import bar
    from liaoyuan.cli.quickstart_report import write_report
    from liaoyuan.cli.summary_table import accuracy_table
    from liaoyuan.cli.tune_options import read_config
    from liaoyuan.report import Text
    from liaoyuan.tasks import check_levels, find_task
    from liaoyuan.tuning.study_run import StudyRunConfig, run_study

    wanted = read_levels(levels) if levels else None
    given = {"model": str(model), "seeds": seeds, "study.lesson.task": task} | dict.fromkeys(LEVELS, wanted)
    config: StudyRunConfig = read_config(StudyRunConfig, run_file, set_, given)
    taught = config.study.lesson
    for place, chosen in zip(LEVELS, (taught.levels, config.study.rl.levels), strict=True):
        check_levels(find_task(taught.task), chosen, f"--levels {levels}" if levels else place)
    with bar("Study", quiet=json) as report:
        summary = run_study(config, out, report, tune_allocator)
    words = Text(
        f"{taught.task}: one model, taught in the same way with {config.seeds} seeds, and measured against controls "
        "that were given the same compute.",
        f"{taught.task}：同一个模型，用 {config.seeds} 个随机种子同样教学，并与获得同等算力的对照组比较。",
    )
    page = write_report(out, words)
    if json:
        print(json_format.dumps(summary, ensure_ascii=False))
        return
    console = Console()
    console.print(accuracy_table(summary))
    for measure in ("greedy", "sampled"):
        points = ", ".join(f"{100 * value:+.1f}" for value in summary["difference_by_seed"][measure])
        console.print(f"RL minus the better control, {measure}, seed by seed: {points} points")
    console.print(f"Report: {page}")
