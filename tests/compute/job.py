"""A launched job of real processes, to be harmed in every way that the tests think of."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from liaoyuan.rundir import read_metrics
from tests.verbs import Verb

PATIENCE = 120.0  # seconds until a wait counts as failed


class Job:
    """`liaoyuan launch OPTIONS train RUN_FILE --out FOLDER` as one host of a job."""

    def __init__(self, run_file: Path, folder: Path, *options: str, settings: tuple[str, ...] = ()) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        overrides = [word for setting in settings for word in ("--set", setting)]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115  (it lives as long as the job)
        self.process = Verb("launch", *options, "train", run_file, "--out", folder, *overrides, out=self._log)

    @property
    def said(self) -> str:
        """What launcher and workers have printed."""
        return Path(self._log.name).read_text(encoding="utf-8")

    def wait(self) -> int:
        """Wait for the launcher's end; return its exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill_host()
            raise AssertionError(self.said) from None

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics have that many steps."""
        self.wait_until(lambda: len(read_metrics(self.folder / "metrics.jsonl")) >= step)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def workers(self) -> dict[int, int]:
        """Return rank -> process of the workers of this launcher that live."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_text().split("\0")
                if "liaoyuan.cli.worker" in words and str(self.process.pid) in words:
                    values = dict(line.split("=", 1) for line in (place / "environ").read_text().split("\0") if line)
                    found[int(values["RANK"])] = int(place.name)
            except OSError:
                continue
        return found

    def kill_host(self) -> None:
        """Kill the launcher and its workers at once, as when a host loses its power."""
        for pid in [self.process.pid, *self.workers().values()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def losses(folder: Path) -> list[tuple[int, float]]:
    """Return step and loss of each row: a step that was skipped or is there twice shows."""
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def newest_state(folder: Path) -> Path:
    return max((folder / "state").glob("step-*"))


def first_host(folder: Path, jobs: list[Job]) -> Job:
    """Return the job whose launcher is the first host of the newest round: it has rank 0 and the round's store."""
    newest = max((folder / "rendezvous").glob("round-*.json"))
    first = json.loads(newest.read_text())["seats"][0]["id"]
    return next(job for job in jobs if f"-{job.process.pid}-" in first)
