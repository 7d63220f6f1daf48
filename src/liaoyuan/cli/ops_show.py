"""What `ops compare` and `ops profile` found, for people."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from liaoyuan.compute.compare import Comparison, Row, growth
from liaoyuan.compute.profile import OperatorTime, Profile, grouped
from liaoyuan.ops.difference import Difference

SMALL = 0.005  # operators below this share of the step are one row together
NUMBERS = ("calls", "ms", "of step", "of roof", "rate", "alone", "in the run")


def comparison_values(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values; an infinite or undefined figure is None."""
    first, parted = found.first, found.parted
    return {
        "differs": found.differs,
        "tolerance": found.tolerance,
        "losses": list(found.losses),
        "first": _row_values(first) if first else None,
        "parted": _row_values(parted) if parted else None,
        "operators": [_row_values(row) for row in found.rows],
        "gradients": {name: _values(difference) for name, difference in found.gradients.items()},
    }


def _row_values(row: Row) -> dict[str, Any]:
    names = ("phase", "module", "operator", "output", "is_beyond", "is_own", "only")
    alone = _values(row.alone) if row.alone else None
    return {name: getattr(row, name) for name in names} | {"difference": _values(row.difference), "alone": alone}


def _values(difference: Difference) -> dict[str, Any]:
    numbers = {name: getattr(difference, name) for name in ("largest", "relative", "first", "second")}
    plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {**plain, "where": list(difference.where), "reason": difference.reason}


def show_comparison(found: Comparison, every: bool) -> None:
    """Print the verdict, the table of growth, and the gradients."""
    console = Console(highlight=False, soft_wrap=True)
    for line in _verdict(found):
        console.print(line, markup=False)
    rows = [row for row in found.rows if not row.only] if every else list(growth(found))
    if rows:
        console.print(_growth_table(rows))
        console.print("relative to the largest element. alone: B's operator on A's inputs. *: beyond tolerance.")
    if found.worst_gradient:
        worst = found.gradients[found.worst_gradient]
        told = f"most in {found.worst_gradient}: {worst.text()}" if worst.relative else "none"
        console.print(f"Gradients of the weights: {len(found.gradients)} compared; differences: {told}.", markup=False)
    console.print(f"Loss: {found.losses[0]:.6f} and {found.losses[1]:.6f}.")


def _verdict(found: Comparison) -> list[str]:
    lines = []
    if found.parted:
        side = found.parted.only
        lines.append(
            f"The two do not call the same operators: the first is {found.parted.name} ({found.parted.phase}), "
            f"which only {side} calls."
        )
    compared = sum(not row.only for row in found.rows)
    if found.first:
        lines += _first(found.first)
    elif found.differs:
        lines.append(f"The gradients differ beyond {found.tolerance:.0e}.")
    elif compared:
        same = not any(row.difference.relative for row in found.rows)
        how = "gave the same bits" if same else f"agree within {found.tolerance:.0e}"
        lines.append(f"All {compared} operators that both call {how}.")
    else:
        lines.append(f"The gradients agree within {found.tolerance:.0e}.")
    return lines


def _first(row: Row) -> list[str]:
    lines = [f"The first to differ beyond tolerance is {row.name}, {row.phase}:", f"  {row.difference.text()}."]
    if row.alone:
        told = row.alone.text() if row.alone.relative else "no difference"
        verdict = "The operator itself differs." if row.is_own else "What differed before it has added up."
        lines.append(f"  From the same inputs: {told}. {verdict}")
    return lines


def _growth_table(rows: Sequence[Row]) -> Table:
    table = _table("operator", "module", "alone", "in the run", "")
    for row in rows:
        alone = f"{row.alone.relative:.1e}" if row.alone else "-"
        mark = "*" if row.is_beyond else ""
        named = _named(row.operator, row.phase)
        table.add_row(named, row.module or "-", alone, f"{row.difference.relative:.1e}", mark)
    return table


def show_profile(found: Profile) -> None:
    """Print where a step's time goes; the rows add up to the step that was measured."""
    console = Console(highlight=False)
    facts, step = found.facts, found.step_seconds
    console.print(
        f"{facts['subject']}: {facts['mode']}, {facts['parameters']:,} weights, {facts['dtype']}, {facts['device']}, "
        f"{facts['threads']} threads, {facts['tokens']:,} tokens a step",
        markup=False,
        soft_wrap=True,
    )
    table = _table("operator", "calls", "ms", "of step", "of roof", "rate")
    rows = grouped(found.operators)
    large = [row for row in rows if found.share(row.seconds) >= SMALL]
    for row in large:
        table.add_row(*_profile_row(row, found))
    small = sum(row.seconds for row in rows[len(large) :])
    others = (("other operators", small), ("between operators", found.between_seconds))
    for name, seconds in (*others, ("measuring", found.measuring_seconds), ("the step", step)):
        table.add_row(name, "", f"{1e3 * seconds:.3f}", f"{found.share(seconds):.1%}")
    console.print(table)
    rates = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in found.rates.items() if name != "memory")
    products = f"products {rates} GFLOP/s, " if rates else ""
    console.print(
        f"A step without a clock in it: {1e3 * found.plain_step_seconds:.3f} ms; the fastest of {found.steps} each. "
        f"Roof, measured now: {products}memory {found.rates['memory'] / 1e9:,.1f} GB/s.",
        soft_wrap=True,
    )


def _profile_row(row: OperatorTime, found: Profile) -> list[str]:
    return [
        _named(row.operator, row.phase),
        f"{row.calls:,.0f}",
        f"{1e3 * row.seconds:.3f}",
        f"{found.share(row.seconds):.1%}",
        f"{row.roof_share:.0%}" if row.roof_seconds else "-",
        _rate(row) if row.roof_seconds else "-",
    ]


def _rate(row: OperatorTime) -> str:
    """Return what the operator reaches of that which binds it."""
    if row.bound == "products":
        return f"{row.flops / row.seconds / 1e9:,.1f} GFLOP/s"
    return f"{row.traffic / row.seconds / 1e9:,.1f} GB/s"


def _named(operator: str, phase: str) -> str:
    """Return the operator with its phase, where the name does not say it."""
    return operator if phase == "forward" or operator.endswith("_backward") else f"{operator}, {phase}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in columns:
        is_number = column in NUMBERS
        table.add_column(
            column, header_style="dim", justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    return table
