"""The machines that a job would run on, as a TOML file describes them; usual ones are here, by name.

Figures of the files that ship are the makers' own, dense and without overhead: what a job gets of them is for
calibration to say. Levels of the network go from the nearest to the farthest.
"""

import itertools
import tomllib
from importlib import resources
from pathlib import Path

from pydantic import Field, field_validator

from liaoyuan import config as configuration
from liaoyuan.compute.plan.machine.recovery import Failures, Recovery
from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError, nearest

GIB = 2**30
CLUSTERS = resources.files("liaoyuan.compute.plan.machine").joinpath("clusters")


class Accelerator(Config):
    """One card as a process has it.

    device: its kind, as torch calls it. memory_gib: of which `reserved_gib` are the runtime's own and the collectives'
    buffers. bandwidth_gb: of that memory, GB/s. peak_tflops: by dtype, dense.
    """

    name: str
    device: str = "cuda"
    memory_gib: float = Field(gt=0)
    reserved_gib: float = Field(2.0, ge=0)
    bandwidth_gb: float = Field(gt=0)
    peak_tflops: dict[str, float]
    watts: float = Field(0.0, ge=0)
    price_per_hour: float = Field(0.0, ge=0)

    @property
    def usable_bytes(self) -> int:
        """What tensors may take."""
        return int((self.memory_gib - self.reserved_gib) * GIB)


class Link(Config):
    """A level of the network: among how many cards it holds (0: all of them), and what each of them sends.

    bandwidth_gb: GB/s of a card, one way, where all send at once within the level; latency_us: of a message.
    oversubscription: by how much less all of them get together on the way to the next level than each alone.
    """

    name: str
    reach: int = Field(ge=0)
    bandwidth_gb: float = Field(gt=0)
    latency_us: float = Field(gt=0)
    oversubscription: float = Field(1.0, ge=1)


class Storage(Config):
    """Where checkpoints go: GB/s of the whole, and at most of one node."""

    write_gb: float = Field(100.0, gt=0)
    read_gb: float = Field(100.0, gt=0)
    node_gb: float = Field(5.0, gt=0)


class Cluster(Config):
    """Cards in nodes, `per_node` in each, joined by links."""

    name: str
    accelerator: Accelerator
    per_node: int = Field(8, gt=0)
    links: tuple[Link, ...] = Field(min_length=1)
    storage: Storage = Storage()
    failures: Failures = Failures()
    recovery: Recovery = Recovery()

    @field_validator("links")
    @classmethod
    def _reach_rises(cls, links: tuple[Link, ...]) -> tuple[Link, ...]:
        reaches = [link.reach or float("inf") for link in links]
        if any(near >= far for near, far in itertools.pairwise(reaches)) or reaches[-1] != float("inf"):
            raise ValueError(
                "levels go from the nearest to the farthest, each reaches further, and the last one 0 (all)"
            )
        return links


def read_cluster(name: str) -> Cluster:
    """Return the cluster of a TOML file, or the one that ships under this name.

    Raises:
        LiaoyuanError: there is neither, or the file is wrong.
    """
    if name.endswith(".toml") or Path(name).is_file():
        return configuration.load(Cluster, Path(name))
    known = cluster_names()
    if name not in known:
        near = nearest(name, known) or "."
        raise LiaoyuanError(f"There is no cluster '{name}'{near} Known are {', '.join(known)}; or give a TOML file.")
    text = CLUSTERS.joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return configuration.parse(Cluster, tomllib.loads(text), name)


def cluster_names() -> list[str]:
    """Return the names of the clusters that ship."""
    return sorted(file.name.removesuffix(".toml") for file in CLUSTERS.iterdir() if file.name.endswith(".toml"))
