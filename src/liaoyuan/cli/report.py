"""`liaoyuan report`: a run, or several over each other, as one page that needs nothing else."""

from pathlib import Path
from typing import Annotated

import typer

PAGE, SUMMARY = "report.html", "summary.json"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, as tune and train write them.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; else report.html in the run.")] = None,
) -> None:
    """Write report.html: curves, findings, results, rollouts. Several runs are drawn over each other."""
    from liaoyuan.errors import LiaoyuanError
    from liaoyuan.rundir import write_atomic
    from liaoyuan.runs import open_run
    from liaoyuan.runs.page import run_page

    if out is None and len(runs) > 1:
        raise LiaoyuanError("Say with --out where the page of several runs is to be.")
    whole = next((path for path in runs if (path / SUMMARY).exists()), None)
    if whole is not None:
        raise LiaoyuanError(
            f"{whole} is a run of runs, a quickstart or a study, and keeps its own {PAGE}: name one of the runs in it."
        )
    folders = {name: open_run(path) for name, path in zip(names_of(runs), runs, strict=True)}
    path = out or runs[0] / PAGE
    write_atomic(path, run_page(folders).html())
    print(f"The report is in {path}.")


def names_of(paths: list[Path]) -> list[str]:
    """Return short names by which the folders differ: their last parts, as many as that takes."""
    whole = [path.resolve() for path in paths]
    for length in range(1, 1 + max(len(path.parts) for path in whole)):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(set(whole)):
            break
    return list(dict.fromkeys(names)) if len(set(names)) < len(names) else names
