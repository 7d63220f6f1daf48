"""`liaoyuan plan calibrate`: what the cards and links at hand really give, in minutes, as a file that `plan` takes."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan.cluster import Cluster
    from liaoyuan.compute.plan.profile import DeviceProfile
    from liaoyuan.device import Device

SHOWN = 5  # benchmarks that are told worst


def calibrate(
    output: Annotated[Path, typer.Option(help="Where the profile is written (JSON).")] = Path("profile.json"),
    cluster: Annotated[
        str | None,
        typer.Option(help="What these machines are: a name, such as h100, or a TOML file (default: by the device)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or an accelerator's type.")] = "auto",
    processes: Annotated[int, typer.Option(min=1, help="How many exchange messages (1: links as assumed).")] = 2,
    minutes: Annotated[float, typer.Option(min=0.0, help="For the timings of the card.")] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time the operators of training and the links here, and write what they give as a device profile."""
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.calibrate import calibrate as measured
    from liaoyuan.compute.plan.measured_links import measure_links, with_links
    from liaoyuan.device import select_device

    chosen = select_device(device)
    machines = _machines(cluster, chosen)
    with bar("Links", quiet=json) as report:
        links = measure_links(chosen, processes, report) if processes > 1 else None
    with bar("Card", quiet=json) as report:
        profile = measured(machines, chosen, minutes, report)
    profile = with_links(profile, machines, links) if links else profile
    profile.save(output)
    print(json_format.dumps(profile.model_dump(), indent=2) if json else _told(profile, output))


def _machines(cluster: str | None, device: "Device") -> "Cluster":
    """Return the cluster of this name, or the one that ships whose card the device says it is."""
    from liaoyuan.compute.plan.cluster import cluster_names, read_cluster

    if cluster or device.is_cpu:
        return read_cluster(cluster or "cpu")
    import torch

    module = torch.get_device_module(device.type)
    name = module.get_device_name() if hasattr(module, "get_device_name") else device.type
    for known in cluster_names():
        if all(part.lower() in name.lower() for part in known.split("-")[-1:]):
            return read_cluster(known)
    raise LiaoyuanError(f"No cluster that ships has a card like {name}: describe it in a TOML file, --cluster FILE.")


def _told(profile: "DeviceProfile", output: Path) -> str:
    products = ", ".join(
        f"{rate.peak_tflops * rate.share.median:,.3g} TFLOP/s in {dtype}" for dtype, rate in profile.products.items()
    )
    worst = sorted(profile.residuals.items(), key=lambda item: -abs(item[1]))[:SHOWN]
    lines = [
        f"{output}: {profile.name}, {len(profile.operators)} operators, from {profile.rests_on}",
        f"  products   {products}",
        f"  memory     {profile.memory.median / 1e9:,.1f} GB/s; {profile.cached_speed:,.1f} times that "
        f"within {profile.cached_bytes / 1e6:,.1f} MB",
        f"  a call     {profile.call.median * 1e6:,.1f} us, and {profile.launch.median * 1e6:,.1f} us of the host",
    ]
    for name, link in profile.links.items():
        lines.append(
            f"  {name:9}  {link.share.median:.0%} of its bandwidth, {link.latency.median * 1e6:,.0f} us a step"
        )
    told = ", ".join(f"{name} {2.718281828**off - 1:+.0%}" for name, off in worst)
    return "\n".join([*lines, f"  told worst: {told}"])
