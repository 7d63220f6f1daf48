"""What a kind of card and its links really give, each figure with how far it is to be trusted; kept as a JSON file.

`assumed` makes one from the makers' figures and what such cards usually give of them, wide; `calibrate.py` measures
one on the machine at hand; published runs narrow one (`published/`). A figure's uncertainty is that of its logarithm.
"""

import math
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from liaoyuan.compute.plan.machine.cards import Card, card_of
from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import write_atomic

VERSION = 1


class Figure(Config):
    """A positive quantity that is known as log-normal: its median, and the standard deviation of its logarithm."""

    median: float = Field(gt=0)
    sigma: float = Field(0.0, ge=0)

    def at(self, z: float) -> "Figure":
        """Return it for certain, `z` standard deviations from its median."""
        return Figure(median=self.median * math.exp(z * self.sigma))


class ProductRate(Config):
    """Of matrix products in one dtype.

    share: of the peak that large products reach.
    tile: the most of m and n that one unit of the card computes at a time, and what k is filled up to; smaller ones,
        down to `least`, are used where they serve better. units: of the card, which work side by side on a tile each.
    half_tile: m n / (m + n) of a tile of which the unit is fed fast enough for half its rate; 0: of any.
    half_k: the k at which half of the rate is reached, since every tile has a beginning and an end.
    """

    peak_tflops: float = Field(gt=0)
    share: Figure
    tile: tuple[int, int, int] = (128, 128, 32)
    least: tuple[int, int] = (16, 16)
    units: int = Field(1, gt=0)
    half_tile: float = Field(0.0, ge=0)
    half_k: float = Field(64.0, ge=0)


class OperatorRate(Config):
    """Of one operator in one dtype, as it was measured on the machine.

    share: of what its kind of work gives: of the rate of the dtype's products, or of the memory's bytes/s, which an
        operator that changes memory in place may exceed. calls: of the usual seconds of a call.
    half: rows, columns and depth that every product costs beside its own; of attention, the last two are keys and
        the size of a head.
    near: how many times as fast bytes are moved that lie in the cache.
    """

    share: float = Field(gt=0)
    calls: float = Field(1.0, ge=0)
    half: tuple[float, float, float] = (0.0, 0.0, 0.0)
    near: float = Field(1.0, ge=1)


class KindRate(Config):
    """What was measured of one kind of collective: how many times its level's share of the bandwidth it gets, and how
    many times the seconds of a step it takes.
    """

    share: float = Field(1.0, gt=0)
    latency: float = Field(1.0, gt=0)


class Carry(Config):
    """What a core computes for a message of one kind, with all threads of its process: seconds, and for each byte that
    the process sends.
    """

    message: float = Field(ge=0)
    byte: float = Field(ge=0)


class LinkRate(Config):
    """Of one level of the network: what collectives get of its bandwidth, and seconds of a step of one of them.

    kinds: what was measured of each kind of them, as `parallel.traffic` names it; of others both are as told.
    """

    share: Figure
    latency: Figure
    kinds: dict[str, KindRate] = Field(default_factory=dict)


class DeviceProfile(Config):
    """What one kind of card gives.

    products: by dtype. attention: of the products' rate, forward and backward, with heads of 128 and many keys; at
    `half_keys` keys that a query sees, and towards heads of no size with `half_head`, it is half.
    memory: bytes/s of element-wise work. What is no larger than `cached_bytes` moves `cached_speed` times as fast.
    operators: by "name.dtype", what was measured of them in place of the above.
    call: seconds that a call takes on the card whatever it does. launch: seconds of the host for each call;
    asking: for each message, where the host is what computes (0: as for a call). carrying: by kind of message, what
    cores compute for it until it is there, where they do: computing has to wait for it if every core has a process.
    links: by the name of the level. contention: how much longer computing takes while messages travel.
    step: spread of a step that nothing here explains (the median of a figure is 1).
    rests_on: in words, where the figures are from. residuals: by benchmark, the logarithm of measured over told.
    """

    version: int = VERSION
    name: str
    products: dict[str, ProductRate]
    attention_forward: Figure
    attention_backward: Figure
    memory: Figure
    call: Figure
    launch: Figure
    links: dict[str, LinkRate]
    contention: Figure
    step: Figure
    rests_on: str
    half_keys: float = Field(64.0, ge=0)
    half_head: float = Field(40.0, ge=0)
    cached_bytes: float = Field(0.0, ge=0)
    cached_speed: float = Field(1.0, ge=1)
    asking: float = Field(0.0, ge=0)
    carrying: dict[str, Carry] = Field(default_factory=dict)
    operators: dict[str, OperatorRate] = Field(default_factory=dict)
    residuals: dict[str, float] = Field(default_factory=dict)

    def figures(self) -> dict[str, Figure]:
        """Return every uncertain figure by a name, such as "products.bfloat16" or "links.rail.share"."""
        found = {f"products.{dtype}": rate.share for dtype, rate in self.products.items()}
        for level, link in self.links.items():
            found |= {f"links.{level}.share": link.share, f"links.{level}.latency": link.latency}
        for name in ("attention_forward", "attention_backward", "memory", "call", "launch", "contention", "step"):
            found[name] = getattr(self, name)
        return found

    def with_figures(self, change: Callable[[str, Figure], Figure]) -> "DeviceProfile":
        """Return a profile each of whose figures is what `change` makes of its name and itself."""
        values = {
            name: change(name, getattr(self, name))
            for name in ("attention_forward", "attention_backward", "memory", "call", "launch", "contention", "step")
        }
        products = {
            dtype: rate.model_copy(update={"share": change(f"products.{dtype}", rate.share)})
            for dtype, rate in self.products.items()
        }
        links = {
            level: link.model_copy(
                update={name: change(f"links.{level}.{name}", getattr(link, name)) for name in ("share", "latency")}
            )
            for level, link in self.links.items()
        }
        return self.model_copy(update={**values, "products": products, "links": links})

    def median(self) -> "DeviceProfile":
        """Return it as if every figure were certain."""
        return self.with_figures(lambda _, figure: figure.at(0.0))

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all; raises LiaoyuanError if it cannot be written."""
        write_atomic(path, self.model_dump_json(indent=2) + "\n")


def read_profile(path: Path) -> DeviceProfile:
    """Return the profile of a JSON file.

    Raises:
        LiaoyuanError: there is none, it is of another version, or it is wrong.
    """
    try:
        profile = DeviceProfile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LiaoyuanError(f"There is no profile {path}: `liaoyuan plan calibrate` writes one.") from error
    except ValueError as error:
        raise LiaoyuanError(f"{path} is no device profile: {error}") from error
    if profile.version != VERSION:
        raise LiaoyuanError(f"{path} is of version {profile.version}; this is {VERSION}: calibrate again.")
    return profile


def assumed(cluster: Cluster) -> DeviceProfile:
    """Return what such cards usually give of the makers' figures (`cards.py`), with wide uncertainty."""
    accelerator = cluster.accelerator
    card = card_of(accelerator)
    links = {
        link.name: LinkRate(
            share=Figure(median=0.8 if link.reach else 0.7, sigma=0.2),
            latency=Figure(median=link.latency_us * 1e-6, sigma=0.4),
        )
        for link in cluster.links
    }
    return DeviceProfile(
        name=accelerator.name,
        products={dtype: _products(card, dtype, peak) for dtype, peak in accelerator.peak_tflops.items()},
        attention_forward=Figure(median=card.attention[0], sigma=0.25),
        attention_backward=Figure(median=card.attention[1], sigma=0.25),
        memory=Figure(median=accelerator.bandwidth_gb * 1e9 * card.memory_share, sigma=0.1),
        call=Figure(median=card.call, sigma=0.4),
        launch=Figure(median=card.launch, sigma=0.4),
        links=links,
        contention=Figure(median=card.contention, sigma=0.05),
        step=Figure(median=1.0, sigma=0.05),
        rests_on=f"the makers' figures, and {card.source}",
    )


def _products(card: Card, dtype: str, peak: float) -> ProductRate:
    share = card.share8 if dtype.startswith("float8") else card.share
    return ProductRate(
        peak_tflops=peak,
        share=Figure(median=share, sigma=card.sigma),
        tile=card.tile,
        least=card.least,
        units=card.units,
        half_tile=card.half_tile,
        half_k=card.half_k,
    )
