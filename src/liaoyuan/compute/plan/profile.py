"""What a kind of card and its links really give, each figure with how far it is to be trusted; kept as a JSON file.

`assumed` makes one from the makers' figures and what such cards usually give of them, wide; `calibrate.py` measures
one on the machine at hand; published runs narrow one (`published/`). A figure's uncertainty is that of its logarithm.
"""

import math
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from liaoyuan.compute.plan.cluster import Accelerator, Cluster
from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError

VERSION = 1


class Figure(Config):
    """A positive quantity that is known as log-normal: its median, and the standard deviation of its logarithm."""

    median: float = Field(gt=0)
    sigma: float = Field(0.0, ge=0)

    def at(self, z: float) -> "Figure":
        """Return it for certain, `z` standard deviations from its median."""
        return Figure(median=self.median * math.exp(z * self.sigma))


class ProductRate(Config):
    """Of matrix products in one dtype: m, n and k cost as `tile`s that are begun, and k short ones start slowly.

    share: of the peak that large products reach. half_k: the k at which half of it is reached.
    """

    peak_tflops: float = Field(gt=0)
    share: Figure
    tile: tuple[int, int, int] = (128, 128, 32)
    half_k: float = Field(64.0, ge=0)


class LinkRate(Config):
    """Of one level of the network: what collectives get of its bandwidth, and seconds of a step of one of them."""

    share: Figure
    latency: Figure


class DeviceProfile(Config):
    """What one kind of card gives.

    products: by dtype. attention: of the products' rate, forward and backward. memory: bytes/s of element-wise work.
    call: seconds that a call takes on the card whatever it does. launch: seconds of the host for each call.
    links: by the name of the level. contention: how much longer computing takes while messages travel.
    step: spread of a step that nothing here explains (the median of a figure is 1).
    rests_on: in words, where the figures are from.
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
            level: LinkRate(
                share=change(f"links.{level}.share", link.share), latency=change(f"links.{level}.latency", link.latency)
            )
            for level, link in self.links.items()
        }
        return self.model_copy(update={**values, "products": products, "links": links})

    def median(self) -> "DeviceProfile":
        """Return it as if every figure were certain."""
        return self.with_figures(lambda _, figure: figure.at(0.0))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


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
    """Return what such cards usually give of the makers' figures, with wide uncertainty."""
    card = cluster.accelerator
    links = {
        link.name: LinkRate(
            share=Figure(median=0.8 if link.reach else 0.7, sigma=0.2),
            latency=Figure(median=link.latency_us * 1e-6, sigma=0.4),
        )
        for link in cluster.links
    }
    rest = _host(card)
    return DeviceProfile(
        name=card.name,
        products={
            dtype: ProductRate(peak_tflops=peak, share=Figure(median=0.7, sigma=0.12), tile=_tile(card))
            for dtype, peak in card.peak_tflops.items()
        },
        attention_forward=Figure(median=0.75, sigma=0.25),
        attention_backward=Figure(median=0.6, sigma=0.25),
        memory=Figure(median=card.bandwidth_gb * 1e9 * 0.8, sigma=0.12),
        links=links,
        rests_on="the makers' figures, and what such cards usually give of them",
        **rest,
    )


def _host(card: Accelerator) -> dict[str, Figure]:
    if card.device == "cpu":
        return {
            "call": Figure(median=5e-6, sigma=0.5),
            "launch": Figure(median=1e-6, sigma=0.5),
            "contention": Figure(median=1.3, sigma=0.2),
            "step": Figure(median=1.0, sigma=0.1),
        }
    return {
        "call": Figure(median=3e-6, sigma=0.4),
        "launch": Figure(median=6e-6, sigma=0.4),
        "contention": Figure(median=1.1, sigma=0.05),
        "step": Figure(median=1.0, sigma=0.05),
    }


def _tile(card: Accelerator) -> tuple[int, int, int]:
    return (16, 64, 32) if card.device == "cpu" else (128, 128, 64)
