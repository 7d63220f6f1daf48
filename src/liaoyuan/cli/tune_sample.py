"""`liaoyuan tune sample`: a model's own answers, the right ones of which become records to learn from."""

import json as json_format
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from liaoyuan.cli.tune_options import Json, Problems, RunFile, Set, Task, read_config


def sample(
    run_file: RunFile = None,
    set_: Set = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the model that answers, with its tokenizer.")] = None,
    task: Task = None,
    data: Problems = None,
    levels: Annotated[str | None, typer.Option(help="Levels of difficulty: '2-4', or '3'; else all.")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Fresh training problems; else 500.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each; else 8.")] = None,
    reward_model: Annotated[
        Path | None, typer.Option(help="Model of tune reward that says what is best; else the task's rewards.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder; the result is its file records.jsonl.")] = Path("runs/sample"),
    json: Json = False,
) -> None:
    """Answer problems many times, and keep the best right answers, each different one once, as records for tune sft."""
    from liaoyuan.cli.levels import read_levels
    from liaoyuan.cli.live_report import followed
    from liaoyuan.tuning.sample_run import RECORDS, SampleConfig, run_sample

    wanted = list(read_levels(levels)) if levels else None
    given = {"model": model, "task": task, "data": data, "levels": wanted, "problems": problems, "samples": samples}
    given["reward_model"] = reward_model
    config: SampleConfig = read_config(SampleConfig, run_file, set_, given)
    with followed("Sample", out) as report:
        result = run_sample(config, out, report)
    if json:
        print(json_format.dumps(result))
        return
    print("\n".join(_lines(result["levels"])))
    print(f"{result['records']:,} records are in {out / RECORDS}.")


def _lines(levels: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a table of what became of the answers to each level."""
    names = list(next(iter(levels.values())))
    yield f"{'level':>7}" + "".join(f"{name:>17}" for name in names)
    for level, counts in levels.items():
        yield f"{level:>7}" + "".join(f"{counts[name]:>17,}" for name in names)
