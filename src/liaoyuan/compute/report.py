"""Which worker failed first, and what it said last."""

import signal
from collections.abc import Container, Mapping
from pathlib import Path

from liaoyuan.compute.heartbeat import LOST_PEER

LINES = 12  # of a worker's output that are shown
STOPPED = 130
SENTENCE = "liaoyuan: "  # how the command line begins a sentence for the user


def first_failure(failures: Mapping[int, int], hung: Container[int] = (), ended: Container[int] = ()) -> int | None:
    """Return the rank that is to blame; `failures` has exit codes in the order of time, negative ones are signals.

    A worker that hung comes first, then one that a signal killed, then one with an error of its own; workers that
    only lost another one, or that the launcher `ended` for its sake, come last.
    """

    def blame(rank: int) -> int:
        code = failures[rank]
        kinds = (
            rank in hung,
            code < 0 and code != -signal.SIGTERM and rank not in ended,
            code > 0 and code not in (LOST_PEER, STOPPED),
            code == LOST_PEER,
            code == STOPPED,
        )
        return next((place for place, kind in enumerate(kinds) if kind), len(kinds))

    return min(failures, key=blame, default=None)


def last_lines(logs: Path, rank: int) -> str:
    """Return the last lines that a worker wrote to standard error, each indented; "" if it wrote nothing."""
    try:
        text = (logs / f"rank-{rank:04d}.err").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-LINES:])


def worker_sentence(output: str) -> str:
    """Return what the command line told the user last, without its prefix; "" if it told nothing."""
    said = [line.strip() for line in output.splitlines() if line.strip().startswith(SENTENCE)]
    return said[-1].removeprefix(SENTENCE) if said else ""
