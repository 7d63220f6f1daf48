"""`liaoyuan plan`: what a run would hold, compute and send on so many processes, before any of them exists."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.plan_advice import buy, largest, shapes
from liaoyuan.cli.plan_calibrate import calibrate
from liaoyuan.cli.plan_goodput import goodput
from liaoyuan.cli.plan_serve import serve, serve_rates
from liaoyuan.cli.plan_tune import PlanCommand, tune
from liaoyuan.cli.plan_validate import validate
from liaoyuan.cli.plan_words import size
from liaoyuan.cli.process import importing
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Accelerator, Footprint, Job
    from liaoyuan.training.pretrain import PretrainConfig

SHOWN = 6  # parts of the memory at the peak

app = typer.Typer(
    cls=PlanCommand,
    rich_markup_mode=None,
    help="Know before you run: what a job needs (the command that is meant if none is named).",
)


@app.command("dry-run")
def plan(
    run_file: Annotated[Path | None, typer.Argument(help="TOML file, as `liaoyuan train` takes it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.microbatches=8.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many processes (cards) it would run on.")] = 1,
    layout: Annotated[str | None, typer.Option(help="In place of [layout]: 'tp=8,pp=16,schedule=1f1b'.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="What it would run on: a name, such as h100, or a TOML file; says whether it fits."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Kind of device, if no cluster says it; else cuda.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Tokens known, if there is no corpus yet.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Process to look at (default: first and last stage).")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell how long a step takes on the cluster, why, and how sure that is.")
    ] = False,
    keep: Annotated[
        str | None, typer.Option(help="Axes that a search leaves as they are: 'tp=8,microbatches=16'.")
    ] = None,
    whole: Annotated[int, typer.Option(min=1, help="Layouts that a search predicts as a whole.")] = 12,
    profile: Annotated[Path | None, typer.Option(help="What `plan calibrate` measured of such a card.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page of the prediction, or of the best layout (default: report.html)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; a page only with --report.")] = False,
) -> None:
    """Dry-run a training job; or rank its layouts, if it has none (or "auto") and a cluster is named."""
    with importing():
        from liaoyuan.cli.plan_job import job_of, names_layout, run_config
        from liaoyuan.cli.plan_page import page_path
        from liaoyuan.cli.plan_step import explain as explained
        from liaoyuan.cli.progress import bar
        from liaoyuan.compute.plan import footprints, read_cluster

    card = read_cluster(cluster).accelerator if cluster else None
    config = run_config(run_file, set_)
    job = job_of(config, processes, layout, device or (card.device if card else "cuda"), vocab)
    if cluster and not names_layout(config, layout) and not explain:
        _search(config, job, cluster, profile, keep, whole, json, page_path(report, json))
        return
    if explain or profile or report:
        explained(config, job, cluster, profile, json, page_path(report, json))
        return
    if bad := [number for number in rank or [] if number >= processes]:
        raise LiaoyuanError(f"There is no process {bad[0]}: they are numbered 0 to {processes - 1}.")
    with bar("Plan", quiet=json) as progress:
        found = footprints(job, tuple(rank) if rank else None, progress)
    if json:
        values: dict[str, Any] = {"processes": processes, "footprints": [asdict(one) for one in found]}
        if card:
            values |= {"card": card.name, "fits": all(one.peak <= card.usable_bytes for one in found)}
        print(json_format.dumps(values, indent=2))
        return
    print(
        f"{job.model.num_parameters():,} weights over {processes:,} processes, {job.resolved.describe()}, "
        f"{job.train.batch_tokens:,} tokens a step"
    )
    for one in found:
        print(_told(one) + (f"\n{_fit(one, card)}" if card else ""))
    print("Memory is that of tensors: workspaces of kernels, collectives' own buffers and fragmentation come on top.")


app.command("calibrate")(calibrate)
app.command("goodput")(goodput)
app.command("validate")(validate)
app.command("largest")(largest)
app.command("buy")(buy)
app.command("shapes")(shapes)


def _search(
    config: "PretrainConfig",
    job: "Job",
    cluster: str,
    profile: Path | None,
    keep: str | None,
    whole: int,
    json: bool,
    page: Path | None,
) -> None:
    with importing():
        from liaoyuan.cli.plan_job import machines_of
        from liaoyuan.cli.plan_page import write_page
        from liaoyuan.cli.plan_search import find, show
        from liaoyuan.cli.progress import bar

    machines, figures = machines_of(cluster, profile)
    with bar("Search", quiet=json) as report:
        ranking = find(job, machines, figures, keep, whole, report)
    show(ranking, figures, json)
    if page:
        write_page(page, config, ranking.best.job, machines, figures, ranking=ranking, quiet=json)


def _told(one: "Footprint") -> str:
    lines = [
        f"\nProcess {one.rank:,}: peak {size(one.peak)}, of which {size(one.lasting)} between steps; "
        f"{one.flops / 1e12:,.1f} TFLOP a step"
    ]
    for part in one.held[:SHOWN]:
        lines.append(f"  {size(part.bytes):>12}  {part.module or 'the model'}: {part.operator} ({part.phase})")
    for name, sent in sorted(one.sent.items(), key=lambda item: -item[1].bytes):
        lines.append(f"  {size(sent.bytes):>12}  sent, {name} in {sent.calls:,} calls")
    return "\n".join(lines)


def _fit(one: "Footprint", card: "Accelerator") -> str:
    room = card.usable_bytes
    verb = "fits in" if one.peak <= room else "does NOT fit in"
    return f"  It {verb} a {card.name}: {one.peak / room:.0%} of the {size(room)} that tensors may take."


app.command("tune")(tune)
app.command("serve")(serve)
app.command("serve-rates")(serve_rates)
