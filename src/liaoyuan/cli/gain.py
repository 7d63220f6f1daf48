"""What a run has gained, as a table for the terminal."""

from collections.abc import Iterator
from typing import Any

ROWS = {"start": "the model it began with", "teacher": "its teacher", "model": "the result", "difference": "difference"}


def gain_lines(accuracy: dict[str, dict[str, dict[str, float]]], problems: int) -> Iterator[str]:
    """Yield the lines; `accuracy` as `tuning.gain` gives it."""
    columns = [name for name in accuracy["model"] if name != "thought_tokens"]
    yield f"On {problems} test problems, percent with 95% intervals:"
    yield " " * 26 + "".join(f"{name:>24}" for name in columns)
    for row in accuracy:
        yield f"  {ROWS[row]:<24}" + "".join(f"{_cell(accuracy[row][name], row):>24}" for name in columns)


def _cell(interval: dict[str, Any], row: str) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    sign = "+" if row == "difference" else ""
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"
