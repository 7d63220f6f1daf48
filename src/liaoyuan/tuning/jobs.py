"""Independent pieces of a study, in processes of one thread each: a tiny model is fastest on one thread.

A job is a function of a folder; what it returns is written to `folder/done.json`, so a study that was killed does not
run it again. Paths in it are kept as seen from that folder, so a study may be moved. The result does not depend on how
many processes there are.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liaoyuan.rundir import Progress, Report, read_json, silent, write_json

DONE = "done.json"
FILES = "files"  # in it: the paths of the result
POLL_SECONDS = 0.5
TELL_SECONDS = 1.0  # a job tells how far it is at most so often

Work = Callable[..., dict[str, Any]]  # (folder, report=..., **arguments) -> what goes into done.json
_told: Any = None  # the queue over which this worker process tells how far its job is


@dataclass(frozen=True)
class Job:
    """`work(folder, report=..., **arguments)` in a process of its own; `weight` is its expected share of the time."""

    name: str
    folder: Path
    work: Work
    arguments: dict[str, Any]
    weight: float = 1.0

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE).exists()

    @property
    def result(self) -> dict[str, Any]:
        """What the work returned, its paths as text, where they are now."""
        found: dict[str, Any] = read_json(self.folder / DONE)
        files = found.pop(FILES, {})
        return found | {name: os.path.normpath(self.folder / place) for name, place in files.items()}


def run_jobs(
    jobs: Sequence[Job], workers: int = 2, report: Report = silent, prepare: Callable[[], object] | None = None
) -> list[dict[str, Any]]:
    """Run the jobs that are not done and return the results of all, in their order.

    Args:
        workers: processes at once; 0 runs the jobs one after another in this process.
        prepare: called first in each process, at module level somewhere (settings of the process).
    """
    shares = {job.name: float(job.is_done) for job in jobs}
    tell = _Teller(jobs, shares, report)
    waiting = [job for job in jobs if not job.is_done]
    if workers and waiting:
        _run_apart(waiting, workers, tell, prepare)
    else:
        for job in waiting:
            _run(job, lambda progress, name=job.name: tell(name, progress))  # type: ignore[misc]
    return [job.result for job in jobs]


class _Teller:
    """Adds the jobs' progress up, by weight, in thousandths of the whole."""

    def __init__(self, jobs: Sequence[Job], shares: dict[str, float], report: Report) -> None:
        total = sum(job.weight for job in jobs)
        self._weights = {job.name: job.weight / total for job in jobs}
        self._shares, self._report = shares, report

    def __call__(self, name: str, progress: Progress) -> None:
        self._shares[name] = progress.done / max(1, progress.total)
        done = sum(self._weights[job] * share for job, share in self._shares.items())
        self._report(Progress(round(1000 * done), 1000, "‰", f"{name}: {progress.text}"))


def _run_apart(jobs: Sequence[Job], workers: int, tell: _Teller, prepare: Callable[[], object] | None) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_begin, initargs=(os.getpid(), queue, prepare)
    ) as pool:
        left: set[Future[None]] = {pool.submit(_run_telling, job) for job in jobs}
        try:
            while left:
                done, left = wait(left, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    tell(*queue.get())
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin(parent: int, queue: Any, prepare: Callable[[], object] | None) -> None:
    """Set up a worker: one thread, and an end together with the process that started it."""
    global _told
    _told = queue
    torch.set_num_threads(1)
    if prepare:
        prepare()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)  # the parent was killed: what is half done is done again when it is started again

    threading.Thread(target=watch, daemon=True).start()


def _run_telling(job: Job) -> None:
    last = 0.0

    def report(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_SECONDS or progress.done == progress.total:
            last = time.monotonic()
            _told.put((job.name, progress))

    _run(job, report)


def _run(job: Job, report: Report) -> None:
    result = job.work(job.folder, report=report, **job.arguments)
    files = {name: os.path.relpath(value, job.folder) for name, value in result.items() if isinstance(value, Path)}
    rest = {name: value for name, value in result.items() if name not in files}
    write_json(job.folder / DONE, rest | ({FILES: files} if files else {}))
