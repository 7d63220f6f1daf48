"""What several replicas say of themselves, added up: health, metrics, slots."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)$")  # Prometheus' text format, version 0.0.4
Sums = dict[str, float]


def total_health(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of all counts; `version` is the lowest, `expert_imbalance` the worst, and `exact` what all say
    alike.
    """
    total: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "pid":
                total[name] = total.get(name, 0) + value
    said = {str(state["exact"]): state["exact"] for state in states if "exact" in state}
    if said:
        total["exact"] = next(iter(said.values())) if len(said) == 1 else False
    for name, of_all in (("version", min), ("expert_imbalance", max)):
        if name in total:
            total[name] = of_all(state[name] for state in states if name in state)
    return total


def total_slots(replies: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the slots of all replicas, numbered through."""
    return [{**slot, "id": number} for number, slot in enumerate(slot for slots in replies for slot in slots)]


def total_props(replies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the first replica says of itself, with the slots of all; they sleep if all of them do."""
    slots, asleep = sum(props["total_slots"] for props in replies), all(props["is_sleeping"] for props in replies)
    return {**replies[0], "total_slots": slots, "is_sleeping": asleep}


def total_load(replies: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return how many answers somebody waits for, of all replicas."""
    return {"server_load": sum(load["server_load"] for load in replies)}


# What is asked of all replicas in the same words, and what becomes of their replies.
TOTALS: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "/slots": total_slots,
    "/props": total_props,
    "/load": total_load,
}


def total_metrics(texts: Iterable[str]) -> str:
    """Return the metrics of all replicas as one text, sample by sample: the sum; of a ratio or a number a batch the
    mean, of a version the lowest, of a maximum the highest."""
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
    elif plain.endswith("_max"):
        total = max(values)
    else:
        total = math.fsum(values) / (len(values) if plain.endswith(("_ratio", "_per_decode")) else 1)
    return str(int(total)) if total.is_integer() else repr(total)
