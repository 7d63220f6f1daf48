"""Layouts side by side: tokens/s, peak memory of a process, and what it sends in a step beside the closed form.

A model of 10M parameters, and one with experts of the same active size, train on the same global batch (rows of 512
tokens, a microbatch is one row at each data rank) in every layout, on gloo processes of one thread. Layouts take
turns, each round runs all of them once, and medians over all steps are shown. On a machine with fewer cores than
processes, tokens/s says what a layout costs in computing and waiting, not how it scales.

Peak memory is the high-water mark of resident memory during steps (VmHWM, reset through /proc/self/clear_refs once the
model is laid out) above what the process had before the model was made. "holds" is its weights and optimiser state.

    python benchmarks/layouts.py --rounds 3 --json layouts.json
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from liaoyuan.data import Batch
from liaoyuan.device import Device, cpu_name, select_device
from liaoyuan.models import Decoder, ModelConfig, initialise, packed_context
from liaoyuan.models.config import Experts
from liaoyuan.parallel import (
    Layout,
    Program,
    Shape,
    Traffic,
    World,
    closed_form,
    lay_out,
    local,
    record_traffic,
    resolve,
    start,
)
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step
from liaoyuan.training.optimiser import Optimiser

MIB = 2**20
BATCH_ROWS = 4
SMALL_SEQUENCE = 64
DENSE = {
    "single": {},
    "single, selective": {"recompute": "selective"},
    "single, full": {"recompute": "full"},
    "fsdp 2": {"fsdp": 2},
    "fsdp 2, selective": {"fsdp": 2, "recompute": "selective"},
    "fsdp 2, full": {"fsdp": 2, "recompute": "full"},
    "dp 2": {"dp": 2},
    "tp 2": {"tp": 2},
    "ulysses 2": {"cp": {"ulysses": 2}},
    "ring 2": {"cp": {"ring": 2}},
    **{f"pp 2, {name}": {"pp": 2, "schedule": name} for name in ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev")},
    "fsdp 4": {"fsdp": 4},
    "dp 2 x fsdp 2": {"dp": 2, "fsdp": 2},
    "tp 4": {"tp": 4},
    "ulysses 4": {"cp": {"ulysses": 4}},
    "ring 4": {"cp": {"ring": 4}},
    "ring 2 x ulysses 2": {"cp": {"ring": 2, "ulysses": 2}},
    "fsdp 2 x tp 2": {"fsdp": 2, "tp": 2},
    "pp 2 x fsdp 2": {"pp": 2, "fsdp": 2},
}
EXPERTS = {
    "single": {},
    "fsdp 2": {"fsdp": 2},
    "ep 2": {"fsdp": 2, "ep": 2},
    "fsdp 4": {"fsdp": 4},
    "ep 2 of fsdp 4": {"fsdp": 4, "ep": 2},
    "ep 4": {"fsdp": 4, "ep": 4},
}
QUICK = ("single", "fsdp 2", "tp 2", "ring 2", "pp 2, 1f1b", "ep 2")


@dataclass(frozen=True)
class Side:
    """A model in a layout."""

    model: str
    name: str
    layout: Layout

    @property
    def processes(self) -> int:
        layout = self.layout
        return layout.pp * layout.dp * layout.fsdp * layout.context * layout.tp

    @property
    def microbatches(self) -> int:
        return BATCH_ROWS // (self.layout.dp * self.layout.fsdp)


def main() -> None:
    options = parse()
    sides = all_sides(options.quick, options.only)
    found: dict[Side, list[list[dict[str, Any]]]] = {side: [] for side in sides}
    begin, total = time.monotonic(), options.rounds * len(sides)
    for round_ in range(options.rounds):
        for number, side in enumerate(sides, 1):
            found[side].append(run(side, options))
            done = round_ * len(sides) + number
            left = (time.monotonic() - begin) / done * (total - done)
            print(f"{done} of {total}: {side.model}, {side.name}; {left:.0f} s to go", file=sys.stderr, flush=True)
    rows = [row_of(side, rounds, options) for side, rounds in found.items()]
    show(rows)
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "cpu": cpu_name()}
        machine["cores"] = len(os.sched_getaffinity(0))
        result = {"rows": rows, "settings": vars(options), "machine": machine}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtype = str(select_device("cpu").default_dtype).removeprefix("torch.")
    parser.add_argument("--dtype", default=dtype, choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a layout in a round")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a small model, six layouts, one round")
    parser.add_argument("--only", default="", metavar="START", help='rows that begin so: "experts", "dense, pp 2"')
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.sequence = 1, 2, SMALL_SEQUENCE
    return options


def all_sides(quick: bool, only: str) -> list[Side]:
    tables = {"dense": DENSE, "experts": EXPERTS}
    return [
        Side(model, name, Layout.model_validate({"fsdp": 1, **axes}))
        for model, table in tables.items()
        for name, axes in table.items()
        if (not quick or name in QUICK) and f"{model}, {name}".startswith(only)
    ]


def config_of(model: str, dtype: str, small: bool = False) -> ModelConfig:
    """Return 10.0M parameters in 8 layers, or, with 2 of 8 experts for each token, 29M of which 10.0M are active."""
    hidden, width, layers, vocabulary = (64, 128, 4, 512) if small else (256, 1024, 8, 4096)
    return ModelConfig(
        model_type="qwen3" if model == "dense" else "qwen3_moe",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        qk_norm=True,
        experts=None if model == "dense" else Experts(8, 2, width // 2),
        dtype=dtype,
    )


def run(side: Side, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each process of a layout measured."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pairs = [context.Pipe(duplex=False) for _ in range(side.processes)]
    workers = [
        context.Process(target=work, args=(theirs, rank, port, side, options), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for worker, (_, theirs) in zip(workers, pairs, strict=True):
        worker.start()
        theirs.close()
    found = [ours.recv() for ours, _ in pairs]
    for worker in workers:
        worker.join()
    return found


def work(answer: Connection, rank: int, port: int, side: Side, options: argparse.Namespace) -> None:
    """Be one process of a layout."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": side.processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = start(Device("cpu"))
    answer.send(measure(side, world, options))
    world.barrier()
    world.close()


def measure(side: Side, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Take steps; return their seconds, this process's memory, and what it sent beside the formula."""
    config = config_of(side.model, options.dtype, options.quick)
    shape = Shape(config, options.sequence, BATCH_ROWS, side.microbatches)
    layout = resolve(side.layout, world.size, shape)
    world = world.arrange(layout)
    load_libraries(side, world, options.dtype)
    batches = own_batches(config, side, world, options.sequence)
    before = memory("VmRSS")
    program = lay_out(initialise(Decoder(config), 0), layout, world).train()
    optimiser = make_optimiser(program, TrainConfig(steps=1), world)
    forget_peak()
    seconds = [step(program, optimiser, batches, world) for _ in range(1 + options.steps)][1:]
    peak = memory("VmHWM") - before
    with record_traffic(world.mesh) as measured:
        program.backward(batches, 1.0)
    place = world.mesh.place("pp") if world.mesh else 0
    expected = closed_form(layout, config, options.sequence, side.microbatches, config.torch_dtype.itemsize, place)
    return {
        "seconds": seconds,
        "peak": peak,
        "holds": held(program, optimiser),
        "measured": plain(measured),
        "formula": plain(expected),
    }


def load_libraries(side: Side, world: World, dtype: str) -> None:
    """Take a step of a small model in this layout, so that what it loads once is not counted as the model's."""
    config = config_of(side.model, dtype, small=True)
    program = lay_out(initialise(Decoder(config), 0), side.layout, world).train()
    optimiser = make_optimiser(program, TrainConfig(steps=1), world)
    step(program, optimiser, own_batches(config, side, world, SMALL_SEQUENCE), world)
    forget_peak()


def own_batches(config: ModelConfig, side: Side, world: World, sequence: int) -> list[Batch]:
    """Return this process's microbatches: one row each, of two documents."""
    generator = torch.Generator().manual_seed(world.data_rank)
    positions, context = packed_context([sequence // 4, sequence - sequence // 4])
    batches = []
    for _ in range(side.microbatches):
        tokens = torch.randint(config.vocab_size, (sequence + 1,), generator=generator)
        batches.append(Batch(tokens[:-1], positions, tokens[1:], torch.ones(sequence), context.boundaries))
    return batches


def step(program: Program, optimiser: Optimiser, batches: Sequence[Batch], world: World) -> float:
    """Take a step of all processes together; return its seconds."""
    world.barrier()
    begin = time.perf_counter()
    take_step(program, optimiser, batches, 1e-4, 1.0, world)
    world.barrier()
    return time.perf_counter() - begin


def forget_peak() -> None:
    """Give back what making the model left behind, and set the high-water mark to what there is."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def held(program: Program, optimiser: Optimiser) -> int:
    """Return the bytes of this process's weights and optimiser state."""
    tensors = [local(weight) for _, weight in program.named_parameters()] + list(optimiser.state().values())
    return sum(x.numel() * x.element_size() for x in tensors)


def plain(traffic: Traffic) -> dict[str, tuple[int, int]]:
    return {f"{axis}: {collective}": (sent.calls, sent.bytes) for (axis, collective), sent in sorted(traffic.items())}


def row_of(side: Side, rounds: Sequence[Sequence[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Put the rounds of a layout together; what is sent is that of the process which sends most."""
    seconds = [max(times) for found in rounds for times in zip(*(one["seconds"] for one in found), strict=True)]
    busiest = max(rounds[-1], key=lambda one: sum(sent for _, sent in one["measured"].values()))
    tokens = BATCH_ROWS * options.sequence
    return {
        "model": side.model,
        "layout": side.name,
        "processes": side.processes,
        "microbatches": side.microbatches,
        "tokens_per_second": tokens / statistics.median(seconds),
        "range": [tokens / max(seconds), tokens / min(seconds)],
        "peak_bytes": statistics.median(max(one["peak"] for one in found) for found in rounds),
        "held_bytes": max(one["holds"] for one in rounds[-1]),
        "measured": busiest["measured"],
        "formula": busiest["formula"],
        "exact": all(one["measured"] == one["formula"] for found in rounds for one in found),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line for each layout, and below it one for each collective."""
    print(
        "| model, layout | processes | tokens/s, median (range) | peak MiB | holds MiB | sends MiB a step (formula) |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["range"]
        print(
            f"| **{row['model']}, {row['layout']}** | {row['processes']} | {row['tokens_per_second']:,.0f} "
            f"({low:,.0f} to {high:,.0f}) | {row['peak_bytes'] / MIB:.0f} | {row['held_bytes'] / MIB:.0f} | "
            f"{total(row['measured']):.2f} ({total(row['formula']):.2f}) |"
        )
        for key, (calls, sent) in row["measured"].items():
            expected = row["formula"].get(key, (0, 0))
            print(
                f"| - {key} | | {calls} calls (formula {expected[0]}) | | | "
                f"{sent / MIB:.2f} ({expected[1] / MIB:.2f}) |"
            )


def total(traffic: dict[str, tuple[int, int]]) -> float:
    return sum(sent for _, sent in traffic.values()) / MIB


if __name__ == "__main__":
    main()
