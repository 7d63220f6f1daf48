"""Machines are described by a file; those that ship are whole, and mistakes in one's own are named."""

from pathlib import Path

import pytest

from liaoyuan.compute.plan import cluster_names, read_cluster
from liaoyuan.errors import LiaoyuanError

OWN = """
name = "ours"
per_node = 4
[accelerator]
name = "card"
memory_gib = 48
bandwidth_gb = 900
peak_tflops = { bfloat16 = 180.0 }
[[links]]
name = "bus"
reach = 4
bandwidth_gb = 30
latency_us = 5
[[links]]
name = "net"
reach = 0
bandwidth_gb = 10
latency_us = 10
"""


@pytest.mark.parametrize("name", cluster_names())
def test_what_ships_is_whole_and_nearer_is_faster(name: str) -> None:
    found = read_cluster(name)
    peaks = found.accelerator.peak_tflops
    assert peaks.get("bfloat16", peaks.get("float16", 0)) > peaks["float32"]
    assert 0 < found.accelerator.usable_bytes < found.accelerator.memory_gib * 2**30
    rates = [link.bandwidth_gb for link in found.links]
    assert rates == sorted(rates, reverse=True)


def test_the_accelerators_of_the_plan_are_there() -> None:
    assert {"h100", "h200", "b200", "a100", "ascend-910b", "ascend-910c", "tpu-v5p", "cpu"} <= set(cluster_names())


def test_ones_own_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text(OWN)
    found = read_cluster(str(tmp_path / "ours.toml"))
    assert [link.name for link in found.links] == ["bus", "net"] and found.accelerator.usable_bytes == 46 * 2**30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("memory_gib", "memory_gb"), "did you mean 'memory_gib'"),
        (("reach = 0", "reach = 8"), "the last one 0"),
        (("reach = 4", "reach = 0"), "each reaches further"),
        (("bandwidth_gb = 30", "bandwidth_gb = -1"), "greater than 0"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    (tmp_path / "ours.toml").write_text(OWN.replace(*change))
    with pytest.raises(LiaoyuanError, match=said):
        read_cluster(str(tmp_path / "ours.toml"))


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(LiaoyuanError, match="did you mean 'h100'"):
        read_cluster("h10")
