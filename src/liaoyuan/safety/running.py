"""Run programs in jails: one, or many at once. Nothing runs before a jail has been tried from inside."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from liaoyuan.safety.jail import Job, Limits, Outcome, finish, start
from liaoyuan.safety.mechanisms import require


def run(source: str | bytes, files: Mapping[str, bytes] | None = None, limits: Limits | None = None) -> Outcome:
    """Run a Python program in a jail of its own and return how it ended.

    Raises:
        RefusedError: this host lacks a part of the jail; nothing has run.
        LiaoyuanError: a name of a file leads out of its folder, or the files do not fit in it.
    """
    return _run(Job(source, files or {}, limits or Limits()))


def run_all(jobs: Sequence[Job], at_once: int | None = None) -> list[Outcome]:
    """Run programs in jails of their own, as many at once as there are cores; raises as `run` does."""
    require()
    with ThreadPoolExecutor(at_once or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_run, jobs))


def _run(job: Job) -> Outcome:
    require()
    return finish([start(job)])[0]
