"""What several replicas say of themselves, added up: health and metrics."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)$")  # Prometheus' text format, version 0.0.4
Sums = dict[str, float]


def total_health(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of all counts; `version` is the lowest, and `exact` what all say alike."""
    total: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "pid":
                total[name] = total.get(name, 0) + value
    said = {str(state["exact"]): state["exact"] for state in states if "exact" in state}
    if said:
        total["exact"] = next(iter(said.values())) if len(said) == 1 else False
    versions = [state["version"] for state in states if "version" in state]
    return {**total, "version": min(versions)} if versions else total


def total_metrics(texts: Iterable[str]) -> str:
    """Return the metrics of all replicas as one text, sample by sample: the sum; of a ratio the mean, of a version the
    lowest."""
    families: dict[str, list[str]] = {}  # head of a family -> names of its samples
    values: dict[str, list[float]] = {}
    for text in texts:
        head: list[str] = []
        for line in text.splitlines():
            if line.startswith("#"):
                head = [*head, line] if head and line.split()[2] == head[0].split()[2] else [line]
            elif match := SAMPLE.match(line):
                name, value = match[1], float(match[2])
                if name not in values:
                    families.setdefault(head[0].split()[2] if head else name, [*head]).append(name)
                values.setdefault(name, []).append(value)
    lines = []
    for members in families.values():
        lines += [f"{name} {_total(name, values[name])}" if name in values else name for name in members]
    return "\n".join(lines) + "\n"


def _total(name: str, values: list[float]) -> str:
    plain = name.partition("{")[0]
    if plain.endswith("_version"):
        total = min(values)
    else:
        total = math.fsum(values) / (len(values) if plain.endswith("_ratio") else 1)
    return str(int(total)) if total.is_integer() else repr(total)
