"""`liaoyuan plan calibrate`: what the cards and links at hand really give, in minutes, as a file that `plan` takes."""

import json as json_format
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan.machine.cluster import Cluster
    from liaoyuan.compute.plan.machine.profile import DeviceProfile
    from liaoyuan.device import Device

STEP = "step."  # how whole steps are called among what is timed
POOR = 0.15  # error of most of them, in logarithms, of a calibration that is not to be trusted


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
    from liaoyuan.compute.plan.calibration.calibrate import calibrate as measured
    from liaoyuan.compute.plan.calibration.measured_links import measure_links, with_links
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
    from liaoyuan.compute.plan.machine.cluster import cluster_names, read_cluster

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
        for kind, rate in link.kinds.items():
            share, latency = link.share.median * rate.share, link.latency.median * rate.latency
            lines.append(f"    {kind:14}  {share:.0%}, {latency * 1e6:,.0f} us")
    whole = {name: off for name, off in profile.residuals.items() if name.startswith(STEP)}
    single = [off for name, off in profile.residuals.items() if name not in whole]
    if single:
        lines.append(f"  half of the single timings are told within {_off(statistics.median(map(abs, single)))}")
    if whole:
        told = ", ".join(f"{name.removeprefix(STEP)} {math.expm1(-off):+.0%}" for name, off in whole.items())
        lines.append(f"  steps of small models, told against timed: {told}")
        middle = statistics.median(map(abs, whole.values()))
        if middle > POOR:
            lines.append(f"  Half of them are off by more than {_off(middle)}: was the machine busy? Calibrate again.")
    return "\n".join(lines)


def _off(log: float) -> str:
    return f"{math.expm1(log):.0%}"
