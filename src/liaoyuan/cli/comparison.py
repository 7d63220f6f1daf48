"""How a tuned model compares to the one that it began from, as a table for the terminal."""

from collections.abc import Iterator
from typing import Any

TITLES = {"held_out": "held-out records, never trained on", "general": "general text, never trained on"}
FIGURES = {"loss": "loss", "perplexity": "perplexity", "token_accuracy": "token accuracy"}


def comparison_lines(compared: dict[str, Any]) -> Iterator[str]:
    """Yield the lines; `compared` is a run's `comparison.json`."""
    kept = compared["kept"]
    yield f"Kept: {kept['choice']} (step {kept['step']})."
    for name, title in TITLES.items():
        if name in compared:
            yield f"{compared[name]['records']:,} {title} ({compared[name]['tokens']:,} learned tokens), 95% intervals:"
            yield from _table(compared[name])


def _table(figures: dict[str, Any]) -> Iterator[str]:
    yield f"  {'':14} {'before':>27} {'after':>27} {'difference':>27}"
    for name, title in FIGURES.items():
        cells = [_cell(figures[name].get(when), name) for when in ("before", "after", "difference")]
        yield f"  {title:14} " + " ".join(f"{cell:>27}" for cell in cells)


def _cell(interval: dict[str, float] | None, name: str) -> str:
    if interval is None:
        return ""
    mean, low, high = (interval[key] * (100 if name == "token_accuracy" else 1) for key in ("mean", "low", "high"))
    unit = "%" if name == "token_accuracy" else ""
    return f"{mean:.3g}{unit} ({low:.3g} to {high:.3g})"
