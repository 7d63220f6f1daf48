"""Seconds from a fault to the next training step, and steps lost; torchrun beside `liaoyuan launch`.

A small model trains in two processes. In its middle one of them is killed (kill -9) or stopped (SIGSTOP), or a whole
host with rank 0 and the rendezvous is killed while a third launcher waits to take its place. Every side runs the same
verb with the same checkpoints. torchrun runs as it is by default and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; it has
no answer to a process that hangs, nor to the loss of the host with its rendezvous, so those are ours alone.

    python benchmarks/recovery.py --rounds 5 --json recovery.json
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from liaoyuan.data import CorpusConfig, prepare_corpus
from liaoyuan.rundir import read_metrics

TRAIN = {"steps": 400, "batch_tokens": 512, "warmup_steps": 2, "checkpoint_every": 20}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "dtype": "float32"}
FAULT_AT = 50  # steps: half-way between two checkpoints
PATIENCE = 120.0  # seconds after which a side counts as not recovered
HANG_TIMEOUT, LOST_AFTER = 5.0, 5.0
LAUNCH = [sys.executable, "-m", "liaoyuan", "launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@dataclass(frozen=True)
class Recovery:
    """What a fault cost: seconds until the next step (None: it never came), and steps done twice."""

    seconds: float | None
    steps_lost: int


@dataclass(frozen=True)
class Side:
    """A way to run: commands of its hosts, its environment, and the fault."""

    name: str
    fault: str
    hosts: tuple[tuple[str, ...], ...]
    environment: tuple[tuple[str, str], ...] = ()


OURS = (*LAUNCH, "--nproc", "2", "--hang-timeout", f"{HANG_TIMEOUT:g}")
HOST = (*LAUNCH, "--nnodes", "2", "--nproc", "1", "--lost-after", f"{LOST_AFTER:g}")
SIDES = (
    Side("liaoyuan launch", "kill -9 of a worker", (OURS,)),
    Side("torchrun", "kill -9 of a worker", ((*TORCHRUN, "-m", "liaoyuan"),)),
    Side(
        f"torchrun, {SHARED_STORE}=1", "kill -9 of a worker", ((*TORCHRUN, "-m", "liaoyuan"),), ((SHARED_STORE, "1"),)
    ),
    Side("liaoyuan launch", f"SIGSTOP of a worker, --hang-timeout {HANG_TIMEOUT:g}", (OURS,)),
    Side("liaoyuan launch", f"host of rank 0 killed, a spare waits, --lost-after {LOST_AFTER:g}", (HOST, HOST, HOST)),
)


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        run_file = prepare(Path(name))
        found: dict[str, list[Recovery]] = {}
        for round_ in range(options.rounds):
            for index, side in enumerate(SIDES):
                folder = Path(name) / f"run-{round_}-{index}"
                recovery = measure(side, run_file, folder)
                found.setdefault(f"{side.fault} | {side.name}", []).append(recovery)
                print(f"{side.fault}, {side.name}: {recovery}", file=sys.stderr)
    show(found)
    if options.json:
        result = {
            "sides": {key: [asdict(recovery) for recovery in rounds] for key, rounds in found.items()},
            "train": TRAIN,
            "shape": SHAPE,
            "machine": {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))},
        }
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def prepare(folder: Path) -> Path:
    """Write a corpus and a run file; return the run file."""
    text = folder / "text"
    text.mkdir()
    for index in range(60):
        (text / f"{index}.txt").write_text("\n".join(f"line {line} of {index}: {line * index}" for line in range(60)))
    corpus = prepare_corpus(CorpusConfig(text=text, vocab_size=400), folder / "corpus")
    values = {"corpus": str(corpus.folder), "sequence_length": 64, "held_out_tokens": 256, "device": "cpu"}
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({**values, "model": SHAPE, "train": TRAIN}))
    return path


def measure(side: Side, run_file: Path, folder: Path) -> Recovery:
    """Run the side, inflict its fault, and wait for the next step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(side.environment)}
    verb = ["train", str(run_file), "--out", str(folder)]
    hosts = [
        subprocess.Popen([*host, *verb], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for host in side.hosts
    ]
    try:
        if not wait(lambda: steps(folder) >= FAULT_AT):
            sys.exit(f"{side.name} did not begin.")
        done, first_file = steps(folder), metrics(folder).stat().st_ino
        inflict(side, hosts, folder)
        start = time.monotonic()
        saved = newest_state(folder)
        came = wait(lambda: steps(folder) > saved and metrics(folder).stat().st_ino != first_file)
        return Recovery(time.monotonic() - start if came else None, done - saved)
    finally:
        for host in hosts:
            end(host.pid)
            host.wait()


def inflict(side: Side, hosts: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Do what the side's fault says."""
    if len(hosts) == 1:
        last = max(children(hosts[0].pid))
        os.kill(last, signal.SIGSTOP if "SIGSTOP" in side.fault else signal.SIGKILL)
        return
    newest = max((folder / "rendezvous").glob("round-*.json"))
    first = json.loads(newest.read_text())["seats"][0]["id"]
    end(next(host.pid for host in hosts if f"-{host.pid}-" in first))


def end(pid: int) -> None:
    """Kill a launcher and its workers at once."""
    for process in [pid, *children(pid)]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def steps(folder: Path) -> int:
    return len(read_metrics(metrics(folder)))


def metrics(folder: Path) -> Path:
    return folder / "metrics.jsonl"


def newest_state(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in (folder / "state").glob("step-*")), default=0)


def wait(condition: Callable[[], bool]) -> bool:
    end_at = time.monotonic() + PATIENCE
    while time.monotonic() < end_at:
        if condition():
            return True
        time.sleep(0.02)
    return False


def show(found: dict[str, list[Recovery]]) -> None:
    """Print one row for each fault and side."""
    print("| fault | side | recovered | seconds to the next step, median (range) | steps lost, median |")
    print("|---|---|---|---|---|")
    for key, rounds in found.items():
        times = sorted(recovery.seconds for recovery in rounds if recovery.seconds is not None)
        shown = f"{statistics.median(times):.1f} ({times[0]:.1f} to {times[-1]:.1f})" if times else "-"
        lost = statistics.median(recovery.steps_lost for recovery in rounds)
        print(f"| {key} | {len(times)} of {len(rounds)} | {shown} | {lost:g} |")


if __name__ == "__main__":
    main()
