"""`liaoyuan plan validate`: how well runs that others published are predicted, by source."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from liaoyuan.compute.plan.published.score import Validation


def validate(
    runs: Annotated[Path, typer.Argument(help="CSV file of published runs, one a line.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Predict training runs that others published, and say how far off: by source, signed, with the worst rows."""
    from rich.console import Console

    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.published.score import validate as score

    with bar("Validate", quiet=json) as report:
        found = score(runs, report)
    values = found.as_json()
    if json:
        print(json_format.dumps(values, indent=2))
        return
    Console(width=None).print(_table(values))
    print(_worst(values))
    print(_summary(values, found))


def _table(values: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(title="Error of the time, %: median of absolute values (signed)", title_justify="left")
    for heading in ("source", "rows", "calibrated", "90% held", "unseen", "constant rate", "0.75 roofline"):
        table.add_column(heading, justify="left" if heading == "source" else "right", overflow="fold")
    for one in values["sources"]:
        known = one if one["rows_scored"] else one["unseen"]
        baselines = known.get("baselines", {})
        table.add_row(
            one["source"],
            f"{one['rows_scored']} of {one['rows']}",
            _error(one if one["rows_scored"] else {}),
            f"{one['coverage_90']:.0%}" if one["rows_scored"] else "",
            _error(one["unseen"]),
            _error(baselines.get("constant_rate", {})),
            _error(baselines.get("roofline", {})),
        )
    return table


def _error(values: dict[str, Any]) -> str:
    if values.get("median_absolute_error") is None:
        return ""
    return f"{100 * values['median_absolute_error']:.1f} ({100 * values['signed_bias']:+.1f})"


def _worst(values: dict[str, Any]) -> str:
    rows = sorted((row for one in values["sources"] for row in one["worst"]), key=lambda row: -abs(row["error"]))
    lines = [
        f"  line {row['line']}: {row['model']} on {row['cards']:,} cards, {100 * row['error']:+.0f}% "
        f"({100 * row['low']:+.0f} to {100 * row['high']:+.0f})"
        for row in rows[:5]
    ]
    return "\n".join(["The worst rows:", *lines])


def _summary(values: dict[str, Any], found: "Validation") -> str:
    lines = [
        f"{values['rows_scored']:,} rows scored, {values['rows_calibrated']:,} used to calibrate, "
        f"{values['rows_refused']:,} refused."
    ]
    lines += [f"  line {one.line} ({one.model}): {one.reason}" for one in found.refused]
    for name, one in (("Calibrated", values), ("Sources never seen", values["unseen"])):
        if one["median_absolute_error"] is None:
            continue
        rate, peak = one["baselines"]["constant_rate"], one["baselines"]["roofline"]
        lines.append(
            f"{name}: error {_error(one)}%, {one['coverage_90']:.0%} within 90% intervals of mean width "
            f"{one['mean_interval_width']:.0%}; constant rate {_error(rate)}%, roofline {_error(peak)}%."
        )
    return "\n".join(lines)
