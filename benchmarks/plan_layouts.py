"""The seconds of a training step in layouts of 1 to 4 processes, told by the planner, against the real step here.

Steps of the training program, each process of one thread and joined by gloo over loopback, take turns with the timings
of the calibration (`plan calibrate`: cores and links), so that all see the same machine. Links are slowed by the
kernel: the processes live in a network namespace whose loopback has a token bucket filter (`tc qdisc ... tbf`), which
all of them share. That needs root, or a kernel that lets users have namespaces.

Of all timings the median counts, of a row in seconds that pass. A shared machine is not equally fast from minute to
minute, so two things are measured beside. Where others use the cores too, a process gets a part of one: the steps of
the calibration take so many times the seconds that they compute, and what is told takes so much longer. Where others
use what cores share (caches, the other half of a core), they compute more slowly: the same small work is timed with the
calibration and before each step of the table, and what is told is slower by as much. No figure is fitted to a step of
this table: the calibration has models and messages of its own.

    python benchmarks/plan_layouts.py --only one "two, plain" --json two.json    # a part of the rows, minutes
    python benchmarks/plan_layouts.py --table two.json four.json slow.json       # the table of all parts
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a namespace has no names of hosts, which torch complains of
tune_process()

import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan import ops  # noqa: E402
from liaoyuan.compute.network import LOOPBACK, listen  # noqa: E402
from liaoyuan.compute.plan import Job, predict, read_cluster  # noqa: E402
from liaoyuan.compute.plan.calibration.calibrate import Measured, fitted, measure, prepare  # noqa: E402
from liaoyuan.compute.plan.calibration.calls import Clock, Step, Timed, varied  # noqa: E402
from liaoyuan.compute.plan.calibration.measured_links import Links, Travelled, timed, with_links  # noqa: E402
from liaoyuan.compute.plan.machine.cluster import Cluster, Link  # noqa: E402
from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure, assumed  # noqa: E402
from liaoyuan.compute.plan.program.apart import apart, apart_each  # noqa: E402
from liaoyuan.compute.plan.program.dry_run import empty_batch  # noqa: E402
from liaoyuan.compute.plan.program.work import Work  # noqa: E402
from liaoyuan.device import Device, cpu_name  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig  # noqa: E402
from liaoyuan.models.config import Experts  # noqa: E402
from liaoyuan.parallel import Layout, World, lay_out, start  # noqa: E402
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step  # noqa: E402
from plan_cpu import Size, summary  # noqa: E402

CORES = 2  # of the machine that `read_cluster("cpu")` describes
STEPS = 4  # of a row in a round, after one that is not counted
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # of unshare(2), from sched.h
SMALL = Size(128, 352, 4, 4, 32, 2048, 12, 128)
MIDDLE = Size(256, 640, 6, 4, 64, 4096, 8, 128, 2)
STAGED = Size(256, 640, 6, 4, 64, 4096, 8, 128, 4)
LONG = Size(192, 512, 4, 4, 48, 2048, 2, 512)
SPARSE = Size(192, 160, 4, 4, 48, 2048, 8, 128, experts=8)
WIDE = Size(320, 896, 6, 4, 80, 4096, 4, 128)


@dataclass(frozen=True)
class Row:
    """A model in a layout, on links of so many Mbit/s for all of its processes together (0: as loopback is)."""

    name: str
    size: Size
    axes: dict[str, Any]
    mbit: int = 0

    @property
    def layout(self) -> Layout:
        return Layout.model_validate({"fsdp": 1, **self.axes})

    @property
    def processes(self) -> int:
        layout = self.layout
        return layout.pp * layout.dp * layout.fsdp * layout.context * layout.tp

    @property
    def key(self) -> str:
        """By which `--only` finds it."""
        count = {1: "one", 2: "two", 3: "three", 4: "four"}[self.processes]
        return f"{count}, {'slow' if self.mbit else 'plain'}, {self.name}"


ROWS = (
    Row("small", SMALL, {}),
    Row("middle", MIDDLE, {}),
    Row("long", LONG, {}),
    Row("sparse", SPARSE, {}),
    Row("middle", MIDDLE, {"fsdp": 2}),
    Row("small", SMALL, {"fsdp": 2}),
    Row("small", SMALL, {"dp": 2}),
    Row("middle", MIDDLE, {"tp": 2}),
    Row("staged", STAGED, {"pp": 2}),
    Row("long", LONG, {"cp": {"ring": 2}}),
    Row("long", LONG, {"cp": {"ulysses": 2}}),
    Row("sparse", SPARSE, {"fsdp": 2, "ep": 2}),
    Row("small", SMALL, {"fsdp": 3}),
    Row("staged", STAGED, {"pp": 3}),
    Row("middle", MIDDLE, {"fsdp": 4}),
    Row("middle", MIDDLE, {"fsdp": 2, "tp": 2}),
    Row("staged", STAGED, {"pp": 2, "fsdp": 2}),
    Row("long", LONG, {"cp": {"ring": 2, "ulysses": 2}}),
    Row("sparse", SPARSE, {"fsdp": 4, "ep": 4}),
    Row("middle", MIDDLE, {"fsdp": 2}, 1000),
    Row("wide", WIDE, {"tp": 2}, 1000),
    Row("long", LONG, {"cp": {"ring": 2}}, 1000),
    Row("small", SMALL, {"fsdp": 2}, 250),
    Row("staged", STAGED, {"pp": 2}, 250),
    Row("sparse", SPARSE, {"fsdp": 2, "ep": 2}, 250),
    Row("middle", MIDDLE, {"fsdp": 4}, 1000),
    Row("middle", MIDDLE, {"fsdp": 2, "tp": 2}, 1000),
    Row("small", SMALL, {"fsdp": 4}, 250),
)


def main() -> None:
    options = parse()
    if options.table:
        parts = [json.loads(path.read_text()) for path in options.table]
    else:
        chosen = [row for row in ROWS if row.key.startswith(tuple(options.only or ("",)))]
        parts = [measured(chosen, options.rounds, options.json)]
        if options.json:
            return
    rows = [row for part in parts for row in compared(part)]
    print(f"{cpu_name()}, processes of one thread")
    print(table(rows))
    if options.details:
        options.details.write_text(json.dumps(rows, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="START", help='rows that begin so: "one" "four, slow"')
    parser.add_argument("--rounds", type=int, default=3, help="in which calibration and steps take turns")
    parser.add_argument("--json", type=Path, help="keep what was measured here, for --table")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="print the table of these parts")
    parser.add_argument("--details", type=Path, help="where each row's parts are written (JSON)")
    return parser.parse_args()


def measured(rows: Sequence[Row], rounds: int, keep: Path | None) -> dict[str, Any]:
    """Return what was timed of the rows, of cores and of links, in plain words; keep it after each row."""
    shares: dict[int, list[float]] = {min(row.processes, CORES): [] for row in rows}
    paces: dict[int, list[float]] = {count: [] for count in shares}
    cards: dict[int, list[Measured]] = {min(row.processes, CORES): [] for row in rows}
    links: dict[tuple[int, int], list[Links]] = {(row.processes, row.mbit): [] for row in rows if row.processes > 1}
    steps: list[list[tuple[float, ...]]] = [[] for _ in rows]
    begin, total = time.monotonic(), rounds * (len(cards) + len(links) + len(rows))
    done = 0

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - begin) / done * (total - done)
        print(f"{done} of {total}: {what}; {left:.0f} s to go", file=sys.stderr, flush=True)

    def values() -> dict[str, Any]:
        return {
            "machine": cpu_name(),
            "rows": {ROWS.index(row): took for row, took in zip(rows, steps, strict=True) if took},
            "shares": shares,
            "paces": paces,
            "cards": {count: plain(middle(found)) for count, found in cards.items()},
            "links": {f"{count} {mbit}": asdict(middle_links(heard)) for (count, mbit), heard in links.items()},
        }

    for _ in range(rounds):
        for count, found in cards.items():
            for card, waits, pace in apart_each(timed_card, [()] * count, count):
                found.append(card)
                shares[count].append(waits)
                paces[count].append(pace)
            tell(f"cores, {count} at once: {statistics.median(shares[count]):.2f} times what is computed")
        for (count, mbit), heard in links.items():
            heard.append(together(count, mbit, timed_links))
            tell(f"links of {count} processes at {mbit or 'all'} Mbit/s")
        for row, took in zip(rows, steps, strict=True):
            took += together(row.processes, row.mbit, timed_steps, row)
            tell(f"{row.key}, {job_of(row).resolved.describe()}, {min(took)[0]:.3f} s")
            if keep:
                keep.write_text(json.dumps(values()) + "\n")
    return values()


def compared(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each row of a part as it was measured and as it is told."""
    begin = assumed(read_cluster("cpu"))
    fits = {int(count): fitted(begin, card_of(values)) for count, values in part["cards"].items()}
    usual = {
        int(count): statistics.median(part["shares"][count]) / statistics.median(paces)
        for count, paces in part["paces"].items()
    }
    found = []
    for number, took in part["rows"].items():
        row = ROWS[int(number)]
        count, cluster = min(row.processes, CORES), cluster_of(row.processes, row.mbit)
        profile = slower(fits[count], usual[count] * statistics.median(pace for *_, pace in took))
        if row.processes > 1:
            links = part["links"][f"{row.processes} {row.mbit}"]
            heard = Links(**links | {"travelled": tuple(Travelled(**one) for one in links["travelled"])})
            profile = with_links(on(cluster, profile), cluster, heard)
        found.append(told(row, took, cluster, profile))
    return found


def card_of(values: dict[str, Any]) -> Measured:
    """Return what was measured of a core, from its JSON."""
    calls = tuple((Timed(call["name"], Work(**call["work"]), nothing), took) for call, took in values["calls"])
    steps = tuple(
        (Step(step["name"], tuple(Work(**work) for work in step["works"]), nothing), took)
        for step, took in values["steps"]
    )
    return Measured(calls, steps)


def slower(profile: DeviceProfile, times: float) -> DeviceProfile:
    """Return the profile of a core of which others take a part."""

    def change(name: str, figure: Figure) -> Figure:
        if name == "memory" or name.startswith("products."):
            return Figure(median=figure.median / times, sigma=figure.sigma)
        return Figure(median=figure.median * times, sigma=figure.sigma) if name in ("call", "launch") else figure

    return profile.with_figures(change)


def on(cluster: Cluster, profile: DeviceProfile) -> DeviceProfile:
    """Return the profile with links of this cluster, as assumed."""
    return profile.model_copy(update={"links": assumed(cluster).links})


def told(row: Row, took: Sequence[Sequence[float]], cluster: Cluster, profile: DeviceProfile) -> dict[str, Any]:
    job = job_of(row)
    guess = predict(job, cluster, profile)
    span, real = guess.step.seconds, statistics.median(wall for wall, *_ in took)
    return {
        "model": row.name,
        "weights": job.model.num_parameters(),
        "layout": job.resolved.describe(),
        "processes": row.processes,
        "mbit": row.mbit,
        "measured": real,
        "fastest": min(wall for wall, *_ in took),
        "computed": statistics.median(cpu for _, cpu, _ in took),
        "told": span.median,
        "low": span.low,
        "high": span.high,
        "error": span.median / real - 1,
        "computing": guess.step.computing,
        "exposed": guess.step.exposed,
    }


def job_of(row: Row) -> Job:
    size = row.size
    sparse = Experts(size.experts, 2, size.ffn) if size.experts else None
    model = ModelConfig(
        *("qwen3_moe" if sparse else "qwen3", size.vocabulary, size.hidden, size.ffn, size.layers),
        *(size.heads, size.heads, size.head),
        qk_norm=True,
        experts=sparse,
        dtype="float32",
    )
    train = TrainConfig(steps=2, batch_tokens=size.rows * size.length, microbatches=size.microbatches)
    return Job(model, row.layout, row.processes, size.length, train, "cpu")


def cluster_of(processes: int, mbit: int) -> Cluster:
    """Return this machine, whose slowed loopback all processes share."""
    found = read_cluster("cpu")
    if not mbit:
        return found
    link = Link(name="slowed", reach=0, bandwidth_gb=mbit / 8e3, latency_us=100, oversubscription=processes)
    return found.model_copy(update={"links": (link,)})


def timed_card() -> tuple[Measured, float, float]:
    """Be a process that calibrates its core; return also how many times what is computed passes meanwhile, and the
    seconds of the small work that says how fast a core is at the moment.
    """
    torch.set_num_threads(1)
    device = Device("cpu")
    calls, steps = prepare(device, ("float32",))
    paced = [Step("pace", (), small_work())]
    found = measure(calls, steps, Clock(device), 0.0, beside=paced, typical=statistics.median)
    *whole, (_, pace) = found.steps
    begin, computed = time.perf_counter(), time.process_time()
    for step in (*steps, *steps):
        step.take()
    waits = (time.perf_counter() - begin) / (time.process_time() - computed)
    timings = tuple((Timed(call.name, call.work, nothing), took) for call, took in found.calls)
    return Measured(timings, tuple((Step(step.name, step.works, nothing), took) for step, took in whole)), waits, pace


def small_work() -> Callable[[], None]:
    """Return work of some hundredths of a second: products that fit the caches, and sums that do not."""
    x, weight = torch.randn(512, 256), torch.randn(1408, 256)
    large = torch.randn(1 << 21)

    def work() -> None:
        for _ in range(4):
            ops.linear(x, weight)
            large.add(large)

    work()
    return work


def nothing() -> None:
    """Stand for a call that is not made again."""


def plain(found: Measured) -> dict[str, Any]:
    """Return it for JSON."""
    return {
        "calls": [({"name": call.name, "work": asdict(call.work)}, took) for call, took in found.calls],
        "steps": [
            ({"name": step.name, "works": [asdict(one) for one in step.works]}, took) for step, took in found.steps
        ],
    }


def middle(found: Sequence[Measured]) -> Measured:
    """Return the median of each."""
    calls = zip(*(one.calls for one in found), strict=True)
    steps = zip(*(one.steps for one in found), strict=True)
    return Measured(
        tuple((each[0][0], statistics.median(took for _, took in each)) for each in calls),
        tuple((each[0][0], statistics.median(took for _, took in each)) for each in steps),
    )


def middle_links(found: Sequence[Links]) -> Links:
    """Return the median of each."""
    times: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for one in (one for links in found for one in links.travelled):
        times.setdefault((one.kind, one.sent), []).append((one.seconds, one.computed))
    travelled = tuple(
        Travelled(*what, *(statistics.median(column) for column in zip(*each, strict=True)))
        for what, each in times.items()
    )
    contention = statistics.median(one.contention for one in found)
    return replace(found[0], travelled=travelled, contention=contention, asking=min(one.asking for one in found))


def together(processes: int, mbit: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what process 0 of so many returns, which are joined by loopback of that speed."""
    return apart(_among, processes, mbit, function, arguments)


def _among(processes: int, mbit: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if mbit:
        slow_down(mbit)
    with listen(LOOPBACK) as free:
        port = free.getsockname()[1]
    calls = [(rank, processes, port, function, arguments) for rank in range(processes)]
    return apart_each(_one, calls, processes)[0]


def _one(rank: int, processes: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = start(Device("cpu"))
    try:
        found = function(world, *arguments)
        world.barrier()
        return found
    finally:
        world.close()


def slow_down(mbit: int) -> None:
    """Take this process into a network of its own, whose loopback lets so much through."""
    kinds = CLONE_NEWNET if os.getuid() == 0 else CLONE_NEWNET | CLONE_NEWUSER
    if ctypes.CDLL(None, use_errno=True).unshare(kinds):
        sys.exit(f"No network of its own for slowed links: {os.strerror(ctypes.get_errno())}. Leave them out: --only.")
    bucket = ("rate", f"{mbit}mbit", "burst", "128kb", "limit", "64mb")
    for command in (
        ("ip", "link", "set", "lo", "up"),
        ("tc", "qdisc", "add", "dev", "lo", "root", "tbf", *bucket),
    ):
        subprocess.run(command, check=True)


def timed_links(world: World) -> Links:
    return timed(world)


def timed_steps(world: World, row: Row) -> list[tuple[float, ...]]:
    """Take steps of the training program; return of each the seconds that passed, those that this process computed with
    all its threads, and those of the small work just before it.
    """
    job = job_of(row)
    world = world.arrange(job.resolved)
    with torch.device("meta"):
        model = Decoder(job.model).to(job.model.torch_dtype)
    program = lay_out(model, job.resolved, world).initialise(0)
    optimiser = make_optimiser(program, job.train, world)
    random = torch.Generator().manual_seed(world.data_rank)
    batches = [varied(empty_batch(job, world), job, random) for _ in range(job.train.microbatches)]
    found, work = [], small_work()
    for _ in range(1 + STEPS):
        world.barrier()
        begin = time.thread_time()
        work()
        pace = time.thread_time() - begin
        world.barrier()
        begin, computed = time.perf_counter(), time.process_time()
        take_step(program, optimiser, batches, job.train.learning_rate, job.train.clip, world)
        world.barrier()
        found.append((time.perf_counter() - begin, time.process_time() - computed, pace))
    return found[1:]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| weights | layout | processes | loopback | measured | told | error |", "|" + "---|" * 7]
    for one in rows:
        speed = f"{one['mbit']:,} Mbit/s" if one["mbit"] else "as it is"
        lines.append(
            f"| {one['weights']:,} | {one['layout']} | {one['processes']} | {speed} | {one['measured']:.3f} s "
            f"| {one['told']:.3f} s | {one['error']:+.1%} |"
        )
    found = summary(list(rows))
    inside = sum(one["low"] <= one["measured"] <= one["high"] for one in rows)
    lines.append(
        f"\n{len(rows)} rows: median error {found['median_error']:.1%}, bias {found['bias']:+.1%}, "
        f"Spearman {found['spearman']:.3f}; {inside} within their interval of 90%"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
