"""The accuracy of a summary as a table on the terminal."""

from rich.table import Table

from liaoyuan.cli.summary import MEASURES, STAGES, Summary


def accuracy_table(summary: Summary) -> Table:
    """Return accuracy by stage, with intervals, and the difference to the better control."""
    table = Table(title=f"Accuracy on {summary['problems']:,} held-out problems, %", title_justify="left")
    for heading in ("", *MEASURES):
        table.add_column(heading.replace("_at_", "@"), justify="right" if heading else "left")
    for stage in (*STAGES, "difference"):
        found = summary["accuracy"].get(stage)
        if found:
            name = "RL minus the better control" if stage == "difference" else STAGES[stage].en
            last = "fast" if "fast" in summary["accuracy"] else "rl"
            table.add_row(name, *[_cell(found.get(measure)) for measure in MEASURES], end_section=stage == last)
    return table


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{100 * value['mean']:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
