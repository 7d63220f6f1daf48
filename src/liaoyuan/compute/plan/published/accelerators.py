"""Accelerators as sources write them: the machines that are meant, with whatever the row itself states of them."""

import re
from dataclasses import dataclass
from functools import cache

from liaoyuan.compute.plan.machine.cluster import Accelerator, Cluster, Link, read_cluster
from liaoyuan.compute.plan.published.rows import Row

KNOWN = (  # sign in the name, cluster that ships, generation whose cards behave alike
    ("gb300", "gb300", "blackwell"),
    ("gb200", "gb200", "blackwell"),
    ("b300", "b300", "blackwell"),
    ("b200", "b200", "blackwell"),
    ("gh200", "h100", "hopper"),
    ("h200", "h200", "hopper"),
    ("h800", "h800", "hopper"),
    ("h100", "h100", "hopper"),
    ("a800", "a800", "ampere"),
    ("a100", "a100", "ampere"),
    ("v100", "v100", "volta"),
    ("910c", "ascend-910c", "ascend"),
    ("910", "ascend-910b", "ascend"),
    ("ascend", "ascend-910b", "ascend"),
    ("v6e", "tpu-v6e", "tpu"),
    ("trillium", "tpu-v6e", "tpu"),
    ("v5p", "tpu-v5p", "tpu"),
    ("v5e", "tpu-v5e", "tpu"),
    ("v5 lite", "tpu-v5e", "tpu"),
    ("v4", "tpu-v4", "tpu"),
    ("mi355", "mi355x", "instinct"),
    ("mi325", "mi325x", "instinct"),
    ("mi300", "mi300x", "instinct"),
    ("mi250", "mi250x", "instinct"),
)
UNKNOWN_PEAK = 400.0  # TFLOP/s of a card of which nothing is known


@dataclass(frozen=True)
class Machines:
    """Where a row ran: the cluster, the generation of its cards, and whether its peak is known at all."""

    cluster: Cluster
    generation: str
    known: bool


def machines(row: Row) -> Machines:
    """Return the machines of a row: those of the maker, changed by what the row states (peak, memory, network)."""
    text = row.accelerator.lower()
    found = next(((name, generation) for sign, name, generation in KNOWN if sign in text), None)
    cluster = (
        _shipped(found[0]) if found else _unknown(row.accelerator, max((peak for _, peak in row.peaks), default=0))
    )
    card = cluster.accelerator
    peaks = {**card.peak_tflops, **dict(row.peaks)}
    if "bfloat16" not in dict(row.peaks) and "float16" in dict(row.peaks) and "bfloat16" in card.peak_tflops:
        peaks["bfloat16"] = peaks["float16"]
    peaks.setdefault("bfloat16", peaks.get("float16") or next(iter(peaks.values()), UNKNOWN_PEAK))
    peaks.setdefault("float16", peaks["bfloat16"])
    values: dict[str, object] = {"peak_tflops": peaks}
    if size := re.search(r"(\d+)\s*gb\b", text):
        values["memory_gib"] = float(size[1])
        if "a100" in text and size[1] == "40":
            values["bandwidth_gb"] = 1555.0
    if speed := re.search(r"([\d.]+)\s*tb/s", text):
        values["bandwidth_gb"] = float(speed[1]) * 1000
    links = list(cluster.links)
    if "pcie" in text:
        links[0] = links[0].model_copy(update={"name": "pcie", "bandwidth_gb": 25.0, "latency_us": 6.0})
    if row.network_gb and len(links) > 1:
        links[-1] = links[-1].model_copy(update={"bandwidth_gb": row.network_gb / cluster.per_node})
    changed = cluster.model_copy(update={"accelerator": card.model_copy(update=values), "links": tuple(links)})
    return Machines(changed, found[1] if found else row.accelerator, bool(found or row.peaks))


@cache
def _shipped(name: str) -> Cluster:
    return read_cluster(name)


def _unknown(name: str, peak: float) -> Cluster:
    """Return the usual machines around a card of which only the peak is known, or not even that."""
    tflops = peak or UNKNOWN_PEAK
    card = Accelerator(
        name=name, memory_gib=80.0, bandwidth_gb=5.0 * tflops, peak_tflops={"bfloat16": tflops, "float16": tflops}
    )
    links = (
        Link(name="node", reach=8, bandwidth_gb=min(450.0, tflops), latency_us=4.0),
        Link(name="network", reach=0, bandwidth_gb=max(12.5, min(50.0, tflops / 12)), latency_us=8.0),
    )
    return Cluster(name=name, accelerator=card, per_node=8, links=links)
