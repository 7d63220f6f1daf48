"""Watches the workers of one host: finds the one that hangs, says where, and kills it, so that the others can go on.

A collective waits for everybody, so one hung worker stops all steps everywhere. Who is to blame: a worker that does
not answer a signal with its stacks, else one that took fewer steps than the others. If neither is on this host, the
other hosts get time to find it on theirs; then this host's workers are all ended.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from liaoyuan.compute.heartbeat import ASK_FOR_STACKS, Beat, read_beat, stacks_file
from liaoyuan.compute.pulse import Clock, Pulse

POLL = 0.2  # seconds
STARTING = 10  # so many times the limit may pass before the first and after the last step: loading, export
ANSWER = 10.0  # seconds in which a worker that can answer has written its stacks, on a busy host too
GRACE = 5.0  # seconds for workers to end by themselves once one of them has failed
GONE = ("Z", "X", "")  # states of a process that has ended
COLLECTIVES = "torch/distributed"  # a worker whose innermost code is here waits for others
STATES = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "D": "waits for a device or file system"}


@dataclass(frozen=True)
class Orders:
    """What the launcher wants of the workers now; read by the watch at every look."""

    stop: bool = False  # end after saving
    kill: bool = False  # end at once


class Watch:
    """Watches `pids()` (rank -> process) in a thread of its own while the block runs.

    Args:
        orders: what the launcher wants, asked at every look.
        hang_timeout: seconds without a step after which a worker counts as hung; 0 never.
        tell: gets a sentence about what was found and done.
    """

    def __init__(
        self,
        pids: Callable[[], Mapping[int, int]],
        folder: Path,
        orders: Callable[[], Orders],
        hang_timeout: float,
        tell: Callable[[str], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self._pids, self._folder, self._orders, self._tell = pids, folder, orders, tell
        self._limit, self._clock, self._pulse = hang_timeout, clock, Pulse(clock)
        self._told: set[int] = set()
        self._failed_at: float | None = None
        self._waiting_since: float | None = None
        self._over = threading.Event()
        self.steps = 0  # the furthest step that a worker of this host reported
        self.hung: dict[int, str] = {}  # rank -> what was wrong with it
        self.ended: set[int] = set()  # ranks that were killed without being to blame

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        """Look once at every worker, and act."""
        pids = dict(self._pids())
        beats = {rank: beat for rank in pids if (beat := read_beat(self._folder, rank))}
        self.steps = max([self.steps, *(beat.done for beat in beats.values())])
        if self._over.is_set():
            return
        orders = self._orders()
        if orders.kill:
            self._end(pids, pids)
        elif orders.stop:
            self._ask_to_stop(pids.values())
        self._end_the_rest(pids, beats)
        if self._limit:
            self._find_hung(pids, beats)

    def _run(self) -> None:
        while not self._over.wait(POLL):
            self.look()

    def _ask_to_stop(self, pids: Iterable[int]) -> None:
        for pid in set(pids) - self._told:
            self._told.add(pid)
            send(pid, signal.SIGTERM)

    def _end(self, ranks: Iterable[int], pids: Mapping[int, int]) -> None:
        """End workers that are not to blame."""
        self.ended.update(rank for rank in ranks if state_of(pids[rank]) not in GONE)
        kill(pids[rank] for rank in ranks)

    def _end_the_rest(self, pids: Mapping[int, int], beats: Mapping[int, Beat]) -> None:
        """Once a worker has failed, the others have `GRACE` to notice by themselves: some wait for it for ever."""
        dead = [rank for rank, pid in pids.items() if state_of(pid) in GONE]
        failed = [rank for rank in dead if rank not in beats or beats[rank].ended != 0]
        if not failed:
            return
        if self._failed_at is None:
            self._failed_at = self._clock()
        if self._clock() - self._failed_at > GRACE:
            self._end([rank for rank in pids if rank not in dead], pids)

    def _find_hung(self, pids: Mapping[int, int], beats: Mapping[int, Beat]) -> None:
        overdue = [rank for rank in pids if self._is_overdue(rank, beats.get(rank))]
        if not overdue:
            self._waiting_since = None
            return
        if self._waiting_since is None:
            self._waiting_since = self._clock()
            self._put_down(self._blame(pids, beats), pids)
            if not self.hung:
                self._tell(f"no step for {self._limit:g} s, and the workers of this host all wait for others.")
        elif not self.hung and self._clock() - self._waiting_since > self._limit:
            self._put_down(dict.fromkeys(pids, "waited in vain for workers of other hosts"), pids)

    def _put_down(self, faults: dict[int, str], pids: Mapping[int, int]) -> None:
        self.hung = faults
        for rank, fault in faults.items():
            self._tell(f"rank {rank} (process {pids[rank]}) {fault}: no step for {self._limit:g} s, so it is killed.")
        kill(pids[rank] for rank in faults)

    def _is_overdue(self, rank: int, beat: Beat | None) -> bool:
        self._pulse.see(str(rank), repr(beat))
        between_steps = beat is not None and 0 < beat.done < beat.total
        return self._pulse.age(str(rank)) > self._limit * (1 if between_steps else STARTING)

    def _blame(self, pids: Mapping[int, int], beats: Mapping[int, Beat]) -> dict[int, str]:
        """Return the workers that hold the others up, and what is wrong with each."""
        faults = {rank: STATES[state] for rank, pid in pids.items() if (state := state_of(pid)) in STATES}
        stacks = self._ask_for_stacks({rank: pids[rank] for rank in beats if rank not in faults})
        silent = [rank for rank, text in stacks.items() if not text and state_of(pids[rank]) not in GONE]
        faults |= dict.fromkeys(silent, "answers no signal")
        places = {rank: innermost(text) for rank, text in stacks.items() if text}
        busy = {rank: place for rank, place in places.items() if COLLECTIVES not in place}
        if not faults and len(busy) < len(places):  # some wait for others, and these do something else
            faults = {rank: f"is in {place} while others wait for it" for rank, place in busy.items()}
        return faults

    def _ask_for_stacks(self, pids: Mapping[int, int]) -> dict[int, str]:
        """Return what each worker adds to its file of stacks within `ANSWER` seconds."""
        files = {rank: stacks_file(self._folder, rank) for rank in pids}
        before = {rank: file.stat().st_size for rank, file in files.items()}
        for pid in pids.values():
            send(pid, ASK_FOR_STACKS)
        end = time.monotonic() + ANSWER
        while any(file.stat().st_size == before[rank] for rank, file in files.items()):
            if time.monotonic() > end or self._over.wait(POLL):
                break
        self._over.wait(POLL)  # what has begun to be written is whole then
        return {rank: file.read_bytes()[before[rank] :].decode("utf-8", "replace") for rank, file in files.items()}


def state_of(pid: int) -> str:
    """Return the kernel's letter for the state of a process (R, S, D, T, Z ...), "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def kill(pids: Iterable[int]) -> None:
    """End processes at once; stopped ones too."""
    for pid in pids:
        send(pid, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a worker that may be gone."""
    if state_of(pid) not in GONE:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def innermost(stacks: str) -> str:
    """Return the file, line and function in which the main thread is, of what faulthandler wrote."""
    threads = re.split(r"(?m)^(?=(?:Current thread|Thread) )", stacks)
    main = next((text for text in reversed(threads) if "File " in text), "")
    found = re.search(r'File "(.*)", line (\d+) in (\S+)', main)
    return f"{found[3]} ({found[1]}:{found[2]})" if found else "no Python code"
