"""`liaoyuan plan goodput`: how long a job takes among failures, where the time goes, what to save and spare."""

import json as json_format
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.plan_words import finite, read_span, size
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Cluster
    from liaoyuan.compute.plan.goodput import Choices, Goodput, Run
    from liaoyuan.compute.plan.span import Span
    from liaoyuan.training.pretrain import PretrainConfig

BAR = 24  # signs of the longest bar
SHOWN = 0.0005  # share of the time below which a loss is not told


def goodput(
    run_file: Annotated[Path | None, typer.Argument(help="TOML file, as `liaoyuan train` takes it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.steps=500000.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="What it would run on: a name, such as h100, or a TOML file.")] = "h100",
    processes: Annotated[int, typer.Option(min=1, help="How many processes (cards) it would run on.")] = 1,
    step_seconds: Annotated[
        str | None,
        typer.Option(metavar="S or LOW,MEDIAN,HIGH", help="Time of a step, without failures (default: predicted)."),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="In place of [layout], to predict a step: 'tp=8,pp=16'.")] = None,
    tokens_per_second: Annotated[
        str | None, typer.Option(metavar="N or LOW,MEDIAN,HIGH", help="In place of it: of all processes together.")
    ] = None,
    checkpoint_gib: Annotated[
        float | None, typer.Option(min=0, help="Size of a checkpoint (default: from the model and its optimiser).")
    ] = None,
    spares: Annotated[int | None, typer.Option(min=0, help="Spare nodes (default: the cluster's).")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Tokens known, if there is no corpus yet.")] = None,
    lives: Annotated[int, typer.Option(min=20, help="How often the job is simulated.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Simulate a job among failures: days, where time is lost, the best interval between saves, and spare nodes."""
    from liaoyuan.cli.plan_job import run_config
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan import read_cluster
    from liaoyuan.compute.plan.goodput import Run, best_every, best_spares, with_choice
    from liaoyuan.compute.plan.goodput import goodput as predicted
    from liaoyuan.compute.plan.machine.cluster import GIB

    config, machines = run_config(run_file, set_), read_cluster(cluster)
    if step_seconds is not None and tokens_per_second is not None:
        raise LiaoyuanError("--step-seconds and --tokens-per-second say the same: give one of them, or none.")
    held = checkpoint_gib * GIB if checkpoint_gib is not None else _state_bytes(config, vocab)
    if step_seconds is not None:
        step = read_span(step_seconds, "--step-seconds")
    elif tokens_per_second is not None:
        step = read_span(tokens_per_second, "--tokens-per-second").under(config.train.batch_tokens)
    else:
        step = _predicted_step(config, processes, machines, layout, vocab, json)
    run, machines = with_choice(Run.of(config.train, config.checkpoint, step, processes, held), machines, spares=spares)
    with bar("As it is", quiet=json) as report:
        now = predicted(run, machines, lives, seed, report)
    with bar("Saves", quiet=json) as report:
        saves = best_every(run, machines, seed=seed, report=report)
    tuned = with_choice(run, machines, every=saves.best.value)
    with bar("Spares", quiet=json) as report:
        nodes = best_spares(*tuned, seed=seed, report=report)
    with bar("At its best", quiet=json) as report:
        best = predicted(*with_choice(*tuned, spares=nodes.best.value), lives, seed, report)
    if json:
        values = {"now": asdict(now), "best": asdict(best), "every": asdict(saves), "spares": asdict(nodes)}
        print(json_format.dumps(finite({"cluster": machines.name, "run": asdict(run), **values}), indent=2))
        return
    print(_heading(run, machines, now))
    print(_table(now, best))
    print(_advice(run, saves, nodes))


def _state_bytes(config: "PretrainConfig", vocab: int | None) -> float:
    from liaoyuan.cli.plan_job import model_of
    from liaoyuan.compute.plan.goodput.state import state_bytes

    try:
        return state_bytes(model_of(config, "cuda", vocab), config.train)
    except LiaoyuanError as error:
        raise LiaoyuanError(f"{error} Or say how large a checkpoint is: --checkpoint-gib.") from error


def _predicted_step(
    config: "PretrainConfig", processes: int, cluster: "Cluster", layout: str | None, vocab: int | None, quiet: bool
) -> "Span":
    """Return the seconds of a step, predicted in the layout of the run file or the option, else in the best one."""
    from liaoyuan.cli.plan_job import job_of, names_layout
    from liaoyuan.cli.plan_search import find
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan import predict
    from liaoyuan.compute.plan.machine.profile import assumed
    from liaoyuan.rundir import Progress

    job, profile = job_of(config, processes, layout, cluster.accelerator.device, vocab), assumed(cluster)
    try:
        with bar("Step", quiet=quiet) as report:
            if not names_layout(config, layout) and processes > 1:
                job = find(job, cluster, profile, None, 1, report).best.job
            seconds = predict(job, cluster, profile).step.seconds
            report(Progress(1, 1, "layout", job.resolved.describe()))
    except LiaoyuanError as error:
        raise LiaoyuanError(f"{error} Or say how long a step takes: --step-seconds 10 or 9,10,12.") from error
    return seconds


def _heading(run: "Run", machines: "Cluster", now: "Goodput") -> str:
    nodes = run.nodes(machines)
    return (
        f"{run.processes:,} cards in {nodes:,} nodes, {machines.name}\n"
        f"{run.steps:,} steps of {run.step.median:,.3g} s: {now.ideal_days.median:,.3g} days if nothing ever failed; "
        f"a checkpoint of {size(run.state_bytes)}\n"
        f"{now.lives:,} lives of the job, each with its own rate of failures: median, and the middle 90%\n"
    )


def _table(now: "Goodput", best: "Goodput") -> str:
    rows: list[tuple[str, ...]] = [("", "as it is", "at its best")]

    def add(name: str, show: Any) -> None:
        rows.append((name, show(now), show(best)))

    add("steps between saves", lambda one: f"{one.every:,}")
    add("spare nodes", lambda one: f"{one.spares:,}")
    add("effective training time", lambda one: _interval(one.ettr, 100, "%"))
    add("days to finish", lambda one: _interval(one.days))
    add("hours between failures", lambda one: _interval(one.mtbf_hours))
    add("failures", lambda one: _interval(one.failures))
    add("  with no spare at hand", lambda one: _interval(one.waits))
    add("a save holds up, s", lambda one: _interval(one.save_seconds))
    add("  is written after, s", lambda one: _interval(one.write_seconds))
    if now.energy_mwh.median:
        add("energy of the cards, MWh", lambda one: _interval(one.energy_mwh))
    if now.cost.median:
        add("cost", lambda one: _interval(one.cost))
    if now.unfinished or best.unfinished:
        add("lives that never ended", lambda one: f"{one.unfinished:.1%}")
    rows.append(("share of the time lost to", "", ""))
    most = max(mean for one in (now, best) for mean, _ in one.losses.values()) or 1.0
    for name in now.losses:
        if max(now.losses[name][0], best.losses[name][0]) >= SHOWN:
            rows.append((f"  {name}", *(_share(one.losses[name][0], most) for one in (now, best))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(part.ljust(width) for part, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _interval(values: "Span", factor: float = 1.0, unit: str = "") -> str:
    low, median, high = (_number(value * factor) for value in (values.low, values.median, values.high))
    return f"{median}{unit} ({low} to {high})"


def _number(value: float) -> str:
    if math.isinf(value):
        return "never"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:,.0f}"


def _share(value: float, most: float) -> str:
    return f"{value:6.2%} {'█' * round(BAR * value / most)}"


def _advice(run: "Run", saves: "Choices", nodes: "Choices") -> str:
    step = run.step.median
    low, high = saves.as_good
    lines = [
        f"\nSave every {saves.best.value:,} steps ({_minutes(saves.best.value * step)}); from {low:,} to {high:,} "
        f"is as good within 0.2%. Daly's formula gives {saves.formula:,}."
    ]
    if saves.best.value != run.every:
        lines[0] += f" (train.checkpoint_every is {run.every:,}.)"
    low, high = nodes.as_good
    lines.append(
        f"{nodes.best.value:,} spare nodes cost the fewest card-hours, their own included; "
        f"from {low:,} to {high:,} is as good within 0.2%:"
    )
    lines.append("  spare nodes    mean ETTR   card-hours, against the best")
    for one in nodes.tried:
        lines.append(f"  {one.value:11,}    {one.ettr:9.1%}   +{one.price / nodes.best.price - 1:.1%}")
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
