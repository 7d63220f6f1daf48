"""`liaoyuan plan RUN.toml --cluster C` without a layout: the best ones, ranked, and why not their neighbours."""

import json as json_format
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from liaoyuan.cli.plan_job import axes_in
from liaoyuan.cli.plan_words import short, told
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Cluster, Job
    from liaoyuan.compute.plan.machine.profile import DeviceProfile
    from liaoyuan.compute.plan.search.reasons import Reason
    from liaoyuan.compute.plan.search.search import Choice, Ranking
    from liaoyuan.rundir import Report

WIDTH = 170  # of the table
ROWS = 12  # layouts of the table
REFUSED = 3  # layouts told that were predicted in vain
WAITING = 0.005  # share of a step below which waiting is not told


def find(
    job: "Job",
    cluster: "Cluster",
    profile: "DeviceProfile",
    keep: str | None,
    whole: int | None,
    report: "Report",
) -> "Ranking":
    """Return the ranking of the job's layouts; `keep`: "tp=8,microbatches=16", `whole`: as `search` takes it."""
    from liaoyuan.compute.plan.search.reckoned import by_prediction
    from liaoyuan.compute.plan.search.search import search
    from liaoyuan.compute.plan.search.space import Kept

    kept = Kept.of(parse_kept(keep)) if keep else None
    return search(job, cluster, profile, by_prediction(cluster, profile), kept, whole, report)


def parse_kept(text: str) -> dict[str, Any]:
    """Return the axes of a text like "tp=8,schedule=zbv" with their values.

    Raises:
        LiaoyuanError: a part is no KEY=VALUE, or the axis is unknown.
    """
    from liaoyuan.compute.plan.search.space import Kept

    values: dict[str, Any] = {}
    for key, value in axes_in(text, "--keep"):
        if key not in ("schedule", "recompute") and not value.isdecimal():
            raise LiaoyuanError(f"--keep: {key} is a number, not '{value}'.")
        values[key] = int(value) if value.isdecimal() else value
    Kept.of(values)
    return values


def show(ranking: "Ranking", profile: "DeviceProfile", json: bool) -> None:
    """Print the ranking and why not the neighbours of its best layout."""
    from liaoyuan.compute.plan.search.reasons import reasons

    found = reasons(ranking, profile)
    if json:
        print(json_format.dumps(to_dict(ranking, found), indent=2))
        return
    job, cards = ranking.job, ranking.cluster.accelerator.name
    print(
        f"{job.model.num_parameters():,} weights on {job.processes:,} x {cards}, {job.train.batch_tokens:,} tokens a "
        f"step: {ranking.legal:,} layouts are legal, {ranking.too_large:,} hold too much, {ranking.too_slow:,} cannot "
        f"be as fast as the best; {ranking.whole:,} were predicted as a whole."
    )
    Console(width=WIDTH, highlight=False).print(_table(ranking))
    print("Why not its neighbours:")
    for reason in found:
        print(f"  {reason.neighbour} {reason.sentence}")
    for choice, why in ranking.refused[:REFUSED]:
        print(f"  {choice.words} was predicted, but {why}.")
    if len(ranking.refused) > REFUSED:
        print(f"  Nor did {len(ranking.refused) - REFUSED} more that were predicted.")
    print(f"\nThe best, for a run file:\n{toml_of(ranking.best)}")
    print(f"Intervals hold 90%; they rest on {ranking.rests_on}.")


def toml_of(choice: "Choice") -> str:
    """Return the sections of a run file that ask for this layout."""
    from liaoyuan.config import to_toml
    from liaoyuan.parallel import Layout

    layout = choice.job.layout
    values = {key: value for key, value in layout if value != getattr(Layout(), key)}
    text = to_toml(Layout.model_construct(_fields_set=set(values), **values)) if values else ""
    kept = [line for line in text.splitlines() if line and not line.startswith("[")]
    lines = [line for line in kept if line.split(" = ")[0] in values]
    if layout.context > 1:
        lines.append(f"cp = {{ ulysses = {layout.cp.ulysses}, ring = {layout.cp.ring} }}")
    return "\n".join(["[layout]", *lines, "[train]", f"microbatches = {choice.job.train.microbatches}", ""])


def _table(ranking: "Ranking") -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for title in (
        "",
        "layout",
        "microbatches",
        "recompute",
        "s a step",
        "tokens/s/card",
        "MFU",
        "memory",
        "bubble",
        "waits for",
    ):
        table.add_column(title, justify="left" if title in ("layout", "waits for") else "right", no_wrap=True)
    for number, choice in enumerate(ranking.choices[: max(ranking.whole, 1)][:ROWS], 1):
        found, seconds = choice.found, choice.seconds
        exposed = found.exposed if found else choice.estimate.exposed
        waits = [
            f"{axis} {value / seconds:.1%}"
            for axis, value in sorted(exposed.items(), key=lambda item: -item[1])
            if axis != "bubble" and value / seconds >= WAITING
        ]
        table.add_row(
            f"{number:2}",
            _axes(choice),
            str(choice.job.train.microbatches),
            choice.job.layout.recompute,
            told(found.seconds) if found else short(seconds),
            short(choice.tokens_per_second),
            f"{choice.utilisation(ranking.peak):.1%}",
            f"{choice.memory_share(ranking.cluster):.0%}",
            f"{exposed.get('bubble', 0.0) / seconds:.1%}",
            ", ".join(waits[:3]),
        )
    return table


def _axes(choice: "Choice") -> str:
    layout = choice.job.layout
    return layout.describe() + (f", {layout.schedule}" if layout.pp > 1 else "")


def to_dict(ranking: "Ranking", found: "list[Reason]") -> dict[str, Any]:
    """Return a ranking as JSON has it."""
    return {
        "processes": ranking.job.processes,
        "cluster": ranking.cluster.name,
        "legal": ranking.legal,
        "too_large": ranking.too_large,
        "too_slow": ranking.too_slow,
        "predicted": ranking.whole,
        "rests_on": ranking.rests_on,
        "choices": [choice_dict(ranking, choice) for choice in ranking.choices],
        "refused": [{"layout": choice.words, "reason": why} for choice, why in ranking.refused],
        "reasons": [asdict(reason) for reason in found],
    }


def choice_dict(ranking: "Ranking", choice: "Choice") -> dict[str, Any]:
    """Return one layout of a ranking as JSON has it."""
    found = choice.found
    values: dict[str, Any] = {
        "layout": choice.job.layout.model_dump(mode="json"),
        "microbatches": choice.job.train.microbatches,
        "words": choice.words,
        "seconds": asdict(found.seconds) if found else choice.estimate.seconds,
        "estimate": choice.estimate.seconds,
        "floor": choice.estimate.floor,
        "bytes": choice.bytes,
        "memory_share": choice.memory_share(ranking.cluster),
        "tokens_per_second": choice.tokens_per_second,
        "model_utilisation": choice.utilisation(ranking.peak),
        "exposed": found.exposed if found else choice.estimate.exposed,
        "predicted": found is not None,
    }
    return values
