"""How much of the communication of a layout is hidden behind computing, beside the same run with overlap off.

Processes of one thread talk over loopback links that are slowed down (`--link`, in a network namespace of its own,
which needs the programs unshare, ip and tc; without them the plain loopback is used and said so). From a trace of one
step of process 0: the time during which collectives are under way, and the share of it during which operators of the
model run. Both runs of a row take turns; medians of steps. Context parallel is compared as pure Ulysses, pure ring and
their hybrid.

    python benchmarks/overlap.py --link 400mbit --rounds 3 --json overlap.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from liaoyuan.cli.process import tune_process

os.environ["OMP_NUM_THREADS"] = "1"
tune_process()

import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan.data import Batch  # noqa: E402
from liaoyuan.device import Device, cpu_name  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise  # noqa: E402
from liaoyuan.models.config import Experts  # noqa: E402
from liaoyuan.parallel import Layout, Program, lay_out, start  # noqa: E402

TOKENS, PORT = 1024, 29517
DENSE = ModelConfig("qwen3", 4096, 320, 960, 6, 8, 4, 40, qk_norm=True)
SPARSE = ModelConfig("qwen3_moe", 4096, 320, 960, 6, 8, 4, 40, qk_norm=True, experts=Experts(8, 2, 480))
ROWS: dict[str, tuple[int, ModelConfig, dict[str, object]]] = {
    "fsdp 2": (2, DENSE, {}),
    "tp 2": (2, DENSE, {"tp": 2, "fsdp": 1}),
    "ep 2": (2, SPARSE, {"ep": 2}),
    "ulysses 2": (2, DENSE, {"cp": {"ulysses": 2}}),
    "ring 2": (2, DENSE, {"cp": {"ring": 2}}),
    "ulysses 4": (4, DENSE, {"cp": {"ulysses": 4}}),
    "ring 4": (4, DENSE, {"cp": {"ring": 4}}),
    "ulysses 2 x ring 2": (4, DENSE, {"cp": {"ulysses": 2, "ring": 2}}),
}


def main() -> None:
    options = parse()
    if options.link and not options.inside:
        slowed = command_in_slow_network(options.link)
        if slowed:
            sys.exit(subprocess.call([*slowed, sys.executable, *sys.argv, "--inside"]))
        print("unshare, ip or tc is missing: the loopback is as fast as it is.", file=sys.stderr)
    link = options.link if options.inside else "loopback as it is"
    print(f"{cpu_name()}, one thread a process, {TOKENS} tokens a data rank, links of {link}")
    rows = [measure(name, options.rounds) for name in options.rows]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"link": link, "machine": cpu_name(), "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="400mbit", help="rate of the links, in tc's words ('': not slowed)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def command_in_slow_network(rate: str) -> list[str] | None:
    """Return the words before a command that run it in a network of its own with slow links, or None."""
    if not all(map(shutil.which, ("unshare", "ip", "tc"))):
        return None
    script = f'ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 256kb latency 200ms && exec "$@"'
    words = ["unshare", "--map-root-user", "--net", "sh", "-c", script, "sh"]
    return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else None


def measure(name: str, rounds: int) -> dict[str, object]:
    """Return one row: seconds of a step and hidden share, overlap off and on."""
    size, model, axes = ROWS[name]
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for number in range(rounds):
        for overlap in (False, True):
            print(f"{name}: round {number + 1} of {rounds}, overlap {'on' if overlap else 'off'}", file=sys.stderr)
            layout = Layout.model_validate({"fsdp": 1 if "cp" in axes else size, **axes, "overlap": overlap})
            found[overlap].append(together(size, model, layout))
    off, on = (
        {key: statistics.median(one[key] for one in found[overlap]) for key in found[overlap][0]}
        for overlap in (False, True)
    )
    return {"layout": name, "off": off, "on": on}


def together(size: int, model: ModelConfig, layout: Layout) -> dict[str, float]:
    """Run steps in `size` processes and return what the first one measured."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    workers = [context.Process(target=work, args=(theirs, rank, size, model, layout)) for rank in range(size)]
    for worker in workers:
        worker.start()
    result: dict[str, float] = ours.recv()
    for worker in workers:
        worker.join()
    return result


def work(connection: Connection, rank: int, size: int, model: ModelConfig, layout: Layout) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    os.environ.update({key: str(value) for key, value in place.items()})
    world = start(Device("cpu")).arrange(layout)
    program = lay_out(initialise(Decoder(model), 0).train(), layout, world)
    batch = batch_of(model, world.data_rank)
    step(program, batch)
    world.barrier()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        step(program, batch)
        seconds.append(time.perf_counter() - begin)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        step(program, batch)
    if rank == 0:
        connection.send({"seconds": statistics.median(seconds), **shares(trace)})
    world.barrier()
    world.close()


def batch_of(model: ModelConfig, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, model.vocab_size, (TOKENS + 1,), generator=generator)
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    return Batch(tokens[:-1], torch.arange(TOKENS), tokens[1:], torch.ones(TOKENS), bounds)


def step(program: Program, batch: Batch) -> None:
    program.backward([batch], 1.0 / TOKENS)
    for _, parameter in program.named_parameters():
        parameter.grad = None


def shares(trace: torch.profiler.profile) -> dict[str, float]:
    """Return seconds during which collectives were under way, and the share of them during which operators ran."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    travels = union([span(e) for e in events if e["name"].startswith("gloo:")])
    computes = union([span(e) for e in events if e["name"].startswith(("aten::", "liaoyuan::"))])
    under_way = sum(end - begin for begin, end in travels)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in travels for b in computes)
    return {"communication": under_way / 1e6, "hidden": both / under_way if under_way else 0.0}


def span(event: dict[str, float]) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| layout | seconds a step, off | on | gain | communicating, off | on | hidden, off | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        off, on = row["off"], row["on"]
        assert isinstance(off, dict) and isinstance(on, dict)
        lines.append(
            f"| {row['layout']} | {off['seconds']:.2f} | {on['seconds']:.2f} "
            f"| {off['seconds'] / on['seconds'] - 1:+.0%} | {off['communication']:.2f} | {on['communication']:.2f} "
            f"| {off['hidden']:.0%} | {on['hidden']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
