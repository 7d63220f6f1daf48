"""Settings of the whole process that must precede work: memory allocator and threads. `doctor` shows them.

Fresh pages are expensive on the CPU: a training step writes hundreds of megabytes of short-lived tensors, and
glibc gives large blocks back to the kernel at once, so each step faults them in again. Keeping them costs
nothing but address space and was measured at +30% on a 30M-parameter training step.
"""

import atexit
import contextlib
import ctypes
import gc
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from liaoyuan.collector import without_collector

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # parameters of mallopt, from malloc.h
NEVER = 2**31 - 1
UNSAID = 120  # exit code of Python where its last words could not be written
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch asks for huge pages if this is 1 when it loads


@dataclass(frozen=True)
class ProcessSettings:
    """What `tune_process` set: allocator, huge pages, threads, and who chose the number of threads."""

    allocator: str
    huge_pages: bool
    threads: int
    threads_from: str


def tune_process(threads: int | None = None) -> ProcessSettings:
    """Set the allocator and the number of threads; to be called before torch is first used.

    Threads: `threads` if given, else OMP_NUM_THREADS if the user set it, else the cores this process may use.
    """
    allocator = "glibc, freed memory is kept" if tune_allocator() else "the system's own"
    if threads is not None:
        number, chosen_by = threads, "the config"
    elif os.environ.get("OMP_NUM_THREADS", "").isdigit():
        number, chosen_by = int(os.environ["OMP_NUM_THREADS"]), "OMP_NUM_THREADS"
    else:
        number, chosen_by = available_cores(), "the cores of this process"
        os.environ["OMP_NUM_THREADS"] = str(number)
    return ProcessSettings(allocator, os.environ.get(HUGE_PAGES) == "1", max(1, number), chosen_by)


def tune_allocator() -> bool:
    """Make glibc keep freed memory, and torch ask for huge pages; return False where the C library is another."""
    os.environ.setdefault(HUGE_PAGES, "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, NEVER), mallopt(TOP_PAD, 64 * 2**20)])


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import rooms without looking for garbage meanwhile, nor ever in what they have made: there is none, and to look
    was a third of the time that a verb took to start.
    """
    with without_collector():
        yield
        if not gc.get_freeze_count():
            gc.freeze()
            atexit.register(gc.unfreeze)  # libraries count what is left of them at the end


def ending_at_once(work: Callable[[], None]) -> None:
    """Do the work and end the process, with its exit code and as Python does, but for the last part: taking every
    module to pieces, which gives back what the kernel takes anyway, costs a second once torch is loaded.

    An exception other than SystemExit is raised, and ends the process in Python's own way.
    """
    code: object = None
    try:
        work()
    except SystemExit as ended:
        code = ended.code
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more, or the disk is full
            code = code or UNSAID
        except (ValueError, AttributeError):  # it was closed
            continue
    os._exit(code or 0)


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files() -> None:
    """Let this process open as many files, connections among them, as it may; shells often set a lower limit."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != most:
        with contextlib.suppress(OSError, ValueError):  # some systems refuse their own figure
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
