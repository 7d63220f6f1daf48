"""Real jobs under `liaoyuan launch`, a worker of which is killed at random times, beside what `plan goodput` simulates.

First what the simulator is fed: runs that nothing interrupts, with and without saves, give the seconds of a step and of
a save; kills half-way between two saves give the seconds of a restart. Then jobs are killed at exponential times, and
two things are compared with the simulator: the effective training time ratio of each with the interval of many
simulated lives, and the seconds of each with those of one life that meets the very same gaps between failures.

    python benchmarks/goodput_real.py --jobs 4 --json goodput.json
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from liaoyuan.compute.plan.goodput.simulate import Chance, Chances, Costs, Lives, chances, simulate
from liaoyuan.compute.plan.machine.recovery import Kind
from liaoyuan.compute.plan.span import exactly
from liaoyuan.rundir import read_metrics
from recovery import LAUNCH, PATIENCE, children, end, metrics, newest_state, prepare, steps

BATCH_TOKENS = 512
SETTINGS = ((2.0, 100), (2.0, 25), (4.0, 25))  # restarts that fit between two kills in the mean, steps between saves
CALM, OFTEN, KILLS = (
    200,
    20,
    3,
)  # steps of a run that nothing interrupts, of which one saves so often; restarts measured
FIRST = 10  # times as long as the median: a step that a process takes first, which is part of its start
LIVES = 2000
NEVER = 10**6  # steps
POLL = 0.02  # seconds
PROCESS = (Kind(name="process", share=1, detect=exactly(0)),)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step as the metrics have it, of what comes on top of each, of a save, of restarts."""

    step: float
    beside: float
    save: float
    restarts: tuple[float, ...]

    @property
    def restart(self) -> float:
        return statistics.fmean(self.restarts)


@dataclass(frozen=True)
class Lived:
    """A job that was killed: seconds from its first step to its last, of a step, and between its kills."""

    mean: float
    every: int
    seconds: float
    step: float
    gaps: tuple[float, ...]
    restarts: tuple[float, ...]  # seconds from a kill to the next step, where no other kill came between
    ettr: float


@dataclass(frozen=True)
class Simulated:
    """What is simulated of a job with the restarts of the others: ETTR of many lives (5%, median, 95%), and the seconds
    of the one that meets the same gaps between failures.
    """

    restart: float
    ettr: tuple[float, float, float]
    seconds: float


class Job:
    """`liaoyuan launch --nproc 2 train`, watched from outside."""

    def __init__(self, run_file: Path, folder: Path, count: int, every: int) -> None:
        self.folder = folder
        words = ["--set", f"train.steps={count}", "--set", f"train.checkpoint_every={every}"]
        command = [*LAUNCH, "--nproc", "2", "--max-restarts", "1000", "train", str(run_file), "--out", str(folder)]
        self.process = subprocess.Popen(
            [*command, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.count = count

    @property
    def done(self) -> int:
        return steps(self.folder)

    @property
    def file(self) -> int:
        """Which file the metrics are in: a run that goes on writes a new one."""
        return metrics(self.folder).stat().st_ino if metrics(self.folder).exists() else 0

    def kill(self) -> None:
        """Kill the last worker with -9, as soon as there is one."""
        while self.process.poll() is None:
            workers = [pid for pid in children(self.process.pid) if b"liaoyuan.cli.worker" in _words(pid)]
            if workers:
                os.kill(max(workers), signal.SIGKILL)
                return
            time.sleep(POLL)

    def wait_for(self, step: int, file: int | None = None) -> float:
        """Wait until the job has done so many steps, in another file than `file`; return when."""
        limit = time.monotonic() + PATIENCE
        while self.done < step or (file is not None and self.file == file):
            if time.monotonic() > limit:
                sys.exit(f"The job in {self.folder} did not come to step {step}.")
            time.sleep(POLL)
        return time.monotonic()

    def close(self) -> None:
        if self.process.poll() is None:
            end(self.process.pid)
        self.process.wait()

    def step_seconds(self) -> float:
        """Return the mean of its steps, but for those with which a process began."""
        seconds = [BATCH_TOKENS / row["tokens_per_second"] for row in read_metrics(metrics(self.folder))]
        most = FIRST * statistics.median(seconds)
        return statistics.fmean(one for one in seconds if one < most)


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_file = prepare(folder)
        measured = measure(run_file, folder)
        print(measured, file=sys.stderr)
        numbers = np.random.default_rng(options.seed)
        lived = []
        for number in range(options.jobs):
            for restarts, every in SETTINGS:
                mean = restarts * measured.restart
                gaps = numbers.exponential(mean, 1000)
                lived.append(
                    live(
                        run_file,
                        folder / f"job-{number}-{restarts:g}-{every}",
                        options.steps,
                        mean,
                        every,
                        gaps,
                        measured,
                    )
                )
                print(lived[-1], file=sys.stderr)
    found = [simulate_it(one, [*lived[:n], *lived[n + 1 :]], measured, options.steps) for n, one in enumerate(lived)]
    show(measured, lived, found, options.steps)
    if options.json:
        jobs = [asdict(one) | {"simulated": asdict(same)} for one, same in zip(lived, found, strict=True)]
        values = {"measured": asdict(measured), "jobs": jobs, "steps": options.steps}
        Path(options.json).write_text(json.dumps(values, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="of each setting")
    parser.add_argument("--steps", type=int, default=2000, help="of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def measure(run_file: Path, folder: Path) -> Measured:
    """Measure what the simulator is fed."""
    seconds, inside = {}, {}
    for name, often in (("plain", NEVER), ("saves", OFTEN)):
        job = Job(run_file, folder / name, CALM, often)
        start = job.wait_for(5)
        seconds[name] = (job.wait_for(CALM) - start) / (CALM - 5)
        inside[name] = job.step_seconds()
        job.close()
    # What is not in the steps of the run that saves, beyond what is not in those of the other, is for the saves.
    beside = seconds["plain"] - inside["plain"]
    save = max(0.0, seconds["saves"] - inside["saves"] - beside) * OFTEN
    restarts = []
    for number in range(KILLS):
        job = Job(run_file, folder / f"kill-{number}", 1000, 10)
        job.wait_for(15)
        file, start = job.file, time.monotonic()
        job.kill()
        restarts.append(job.wait_for(newest_state(job.folder) + 1, file) - start - seconds["plain"])
        job.close()
    return Measured(inside["plain"], beside, save, tuple(restarts))


def live(
    run_file: Path,
    folder: Path,
    count: int,
    mean: float,
    every: int,
    gaps: np.ndarray,
    measured: Measured,
) -> Lived:
    """Run a job to its end, killing it at the end of each gap."""
    job = Job(run_file, folder, count, every)
    start = last = job.wait_for(1)
    kills, restarts = list[float](), list[float]()
    down: tuple[float, int, int] | None = None  # when a worker was killed, the file and the state then
    due = start + gaps[0]
    while job.done < count:
        now = time.monotonic()
        if down and job.file not in (0, down[1]) and job.done > down[2]:
            restarts.append(now - down[0] - measured.step)
            down = None
        if now >= due:
            file = job.file
            job.kill()
            now = time.monotonic()
            kills.append(now - last)
            down, last, due = (now, file, newest_state(folder)), now, now + gaps[len(kills)]
        time.sleep(POLL)
    seconds = time.monotonic() - start
    step = job.step_seconds() + measured.beside
    job.process.wait(PATIENCE)
    return Lived(mean, every, seconds, step, tuple(kills), tuple(restarts), count * step / seconds)


def simulate_it(one: Lived, others: list[Lived], measured: Measured, count: int) -> Simulated:
    """Simulate a job with the restarts that were measured before and in the other jobs, not with its own."""
    restart = statistics.fmean([*measured.restarts, *(seconds for other in others for seconds in other.restarts)])
    many = simulated(one, measured, restart, count, chances(1, LIVES), LIVES)
    same = simulated(one, measured, restart, count, _given(one.gaps, one.mean), 1)
    low, median, high = (float(value) for value in np.quantile(many.ettr, [0.05, 0.5, 0.95]))
    return Simulated(restart, (low, median, high), float(same.seconds[0]))


def simulated(one: Lived, measured: Measured, restart: float, count: int, chance: Chances, lives: int) -> Lives:
    """Simulate lives of the job with what was measured."""
    values = {
        **dict.fromkeys(("write", "local_every", "local_block", "stop", "load", "load_local"), 0.0),
        **dict.fromkeys(("swap", "requeue", "repair", "spares"), 0.0),
        "steps": count,
        "step": one.step,
        "every": one.every,
        "block": measured.save,
        "mean": one.mean,
        "start": restart,
        "stretch": 1,
        "slow": 1,
        "stop_mean": math.inf,
    }
    costs = Costs(detect=np.zeros((lives, 1)), **{name: np.full(lives, float(value)) for name, value in values.items()})
    return simulate(costs, PROCESS, chance, np.full(lives, np.inf))


def _given(gaps: tuple[float, ...], mean: float) -> Chances:
    """Return the gaps that were, and then no more failures."""

    def chance(number: int) -> Chance:
        gap = gaps[number] / mean if number < len(gaps) else math.inf
        return Chance(np.array([gap]), np.zeros(1), np.zeros(1), np.zeros(1))

    return chance


def show(measured: Measured, lived: list[Lived], found: list[Simulated], count: int) -> None:
    """Print what was fed, and a row for each job."""
    restarts = ", ".join(f"{one:.1f}" for one in measured.restarts)
    print(
        f"{count:,} steps; a save {measured.save * 1000:.0f} ms, a restart {measured.restart:.1f} s ({restarts}), "
        f"a step {1000 * (measured.step + measured.beside):.1f} ms\n"
    )
    print(
        "| kills every, s | saves every, steps | kills | restart, s | ETTR | simulated, median (90%) | inside "
        "| seconds | of a life with the same kills | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    errors, inside = [], 0
    for one, same in zip(lived, found, strict=True):
        low, median, high = same.ettr
        errors.append(same.seconds / one.seconds - 1)
        holds = low <= one.ettr <= high
        inside += holds
        ettr = f"{one.ettr:.1%} | {median:.1%} ({low:.1%} to {high:.1%}) | {'yes' if holds else 'no'}"
        own = f"{statistics.fmean(one.restarts):.1f}" if one.restarts else "-"
        print(
            f"| {one.mean:.0f} | {one.every} | {len(one.gaps)} | {own}, simulated {same.restart:.1f} | {ettr} "
            f"| {one.seconds:.1f} | {same.seconds:.1f} | {errors[-1]:+.1%} |"
        )
    print(
        f"\n{inside} of {len(lived)} inside; error of seconds: median {statistics.median(map(abs, errors)):.1%}, "
        f"signed mean {statistics.fmean(errors):+.1%}"
    )


if __name__ == "__main__":
    main()
