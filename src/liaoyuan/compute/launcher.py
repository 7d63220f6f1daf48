"""Run a command in many processes, round after round, until it is done: the launcher of one host.

A round is one try: the hosts meet, the workers run, and if a worker dies or hangs or a host is lost, all meet again
and go on from the newest checkpoint, in as many processes as are left and as the work can be divided over. The command
must itself go on from what it saved, which every verb of Liaoyuan does.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from liaoyuan.collector import without_collector
from liaoyuan.compute.board import Board
from liaoyuan.compute.heartbeat import LOST_PEER
from liaoyuan.compute.layout import Legal, any_number
from liaoyuan.compute.meeting import Meeting, Place, Rules
from liaoyuan.compute.network import LOOPBACK, interface_of, this_host
from liaoyuan.compute.report import first_failure, last_lines, worker_sentence
from liaoyuan.compute.watchdog import Orders, Watch
from liaoyuan.errors import LiaoyuanError

Tell = Callable[[str], None]  # gets what happens, a sentence at a time
Command = Callable[[Path], list[str]]  # what a worker runs, given the folder for its heartbeat
REFUSED = 2  # exit code of a command that the user must mend
STOPPED = 130  # exit code of a worker that was asked to stop, and saved
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a try after one that brought nothing; times 4 each time


@dataclass(frozen=True)
class LaunchConfig:
    """How a command is run. Ranges are (fewest, most); times in seconds.

    processes: of each host. hosts: that run together. rendezvous: folder that all hosts share (None: this host alone).
    max_restarts: tries in a row that come no further than the ones before, after which the launcher gives up.
    hang_timeout: a worker without a step for so long hangs. lost_after: a host without a sign of life is lost.
    legal: whether the work can be divided over a number of processes.
    """

    processes: tuple[int, int]
    logs: Path
    hosts: tuple[int, int] = (1, 1)
    rendezvous: Path | None = None
    address: str | None = None
    max_restarts: int = 3
    hang_timeout: float = 600.0
    join_timeout: float = 600.0
    lost_after: float = 30.0
    legal: Legal = any_number


class Interrupted(LiaoyuanError):  # noqa: N818  (not an error: it was asked for)
    """Ctrl-C or SIGTERM ended the job."""

    exit_code = STOPPED


def launch(command: Command, config: LaunchConfig, tell: Tell) -> None:
    """Run `command` in many processes until it is done; this host's part of it.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the workers have saved.
        LiaoyuanError: the command refuses its input, fails again and again, or too few hosts came.
    """
    rules = Rules(
        config.hosts, config.hosts[0] * config.processes[0], config.legal, config.join_timeout, config.lost_after
    )
    history = History(config.max_restarts)
    with tempfile.TemporaryDirectory(prefix="liaoyuan-launch-") as private, _stop_signals() as stop:
        board = Board(config.rendezvous or Path(private) / "rendezvous")
        with Meeting(board, this_host(config.processes[1], config.address), rules) as meeting:
            while place := meeting.join(lambda: stop.count > 0):
                ended = _run(place, command, config, meeting, stop, Path(private), tell)
                if ended.succeeded and meeting.finish(lambda: stop.count > 0):
                    break
                _raise_if_stopped(stop)
                next_try(ended, history, config, meeting, tell)
            _raise_if_stopped(stop)


@dataclass(frozen=True)
class RoundEnd:
    """How a round ended on this host."""

    succeeded: bool
    steps: int  # the furthest step that a worker of this host reported
    rank: int | None = None  # the first worker to fail here, if one did
    code: int = 0  # its exit code
    reason: str = ""  # a sentence
    output: str = ""  # the last lines of that worker

    @property
    def is_mine(self) -> bool:
        """Whether a worker of this host is to blame, rather than one that it lost."""
        return self.rank is not None and self.code not in (LOST_PEER, STOPPED)


class History:
    """Counts tries in a row that came no further than the ones before them."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self.best = 0  # steps
        self.vain = 0  # tries in a row

    def note(self, steps: int) -> int:
        """Note how far a try came; return how many came no further, this one included (0: it did)."""
        self.vain = 0 if steps > self.best else self.vain + 1
        self.best = max(self.best, steps)
        return self.vain

    @property
    def is_hopeless(self) -> bool:
        return self.vain > self.max_restarts

    @property
    def pause(self) -> float:
        """Seconds to wait before the next try."""
        return min(LONGEST_PAUSE, PAUSE * 4 ** (self.vain - 1)) if self.vain else 0.0


def _run(
    place: Place, command: Command, config: LaunchConfig, meeting: Meeting, stop: "_Stop", private: Path, tell: Tell
) -> RoundEnd:
    """Run one round on this host."""
    with without_collector():
        from liaoyuan.compute.agent import Round  # brings torch, which mistakes need not wait for

    logs = _log_folder(config.logs, place, private)
    beats = Path(tempfile.mkdtemp(dir=private))
    _choose_interface(place, meeting.address)
    tell(_opening(place, logs))
    round_ = Round(place, command(beats), logs, lambda: meeting.verdict is not None)
    written = False

    def orders() -> Orders:
        nonlocal written
        if not written and len(round_.pids()) == place.processes:
            written = True
            with suppress(OSError):  # nobody needs it so much that a full disk may end the watch
                (logs / f"processes-{meeting.host}.json").write_text(json.dumps(round_.pids()), encoding="utf-8")
        verdict = meeting.verdict
        over = verdict is not None and verdict.outcome == "again"
        gentle = over and verdict is not None and verdict.gentle
        return Orders(stop=stop.count > 0 or gentle, kill=stop.count > 1 or (over and not gentle))

    with Watch(round_.pids, beats, orders, config.hang_timeout, tell) as watch:
        ended = round_.run()
    return _sum_up(ended.succeeded, ended.failures, watch, meeting, logs)


def _sum_up(succeeded: bool, failures: Mapping[int, int], watch: Watch, meeting: Meeting, logs: Path) -> RoundEnd:
    if succeeded:
        return RoundEnd(True, watch.steps)
    rank = first_failure(failures, watch.hung, watch.ended)
    if rank is None or rank in watch.ended or failures[rank] in (LOST_PEER, STOPPED, -signal.SIGTERM):
        code = failures[rank] if rank is not None else 0
        found = "the workers were asked to stop" if code == STOPPED else "the workers have lost some of the others"
        reason = meeting.verdict.reason if meeting.verdict else found
        return RoundEnd(False, watch.steps, rank, code, reason)
    reason = f"rank {rank} on {meeting.host} {watch.hung.get(rank) or how_it_ended(failures[rank])}"
    output = "" if failures[rank] == -signal.SIGKILL else last_lines(logs, rank)  # that one had no last words
    return RoundEnd(False, watch.steps, rank, failures[rank], reason, output)


def how_it_ended(code: int) -> str:
    """Return in words what an exit code says; a signal is a negative one."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def next_try(ended: RoundEnd, history: History, config: LaunchConfig, meeting: Meeting, tell: Tell) -> None:
    """Say why the round ended, and prepare the next one; raises LiaoyuanError if that would be of no use."""
    if ended.succeeded:
        return
    meeting.end(ended.reason)
    if ended.code == REFUSED and not ended.steps and not history.best:
        raise LiaoyuanError(worker_sentence(ended.output) or f"{ended.reason}: {ended.output}")
    if ended.rank is None or ended.code == STOPPED:
        tell(f"{ended.reason}; all hosts meet again.")
        return
    vain = history.note(ended.steps)
    if history.is_hopeless:
        raise LiaoyuanError(_given_up(ended, history, config.logs))
    output = f"\n{ended.output}" if ended.output else ""
    tell(f"{ended.reason} after step {ended.steps}; the work goes on from the newest checkpoint.{output}")
    if vain > 1 and ended.is_mine and meeting.slots > config.processes[0]:
        meeting.offer(meeting.slots - 1)  # a card or core may be bad: do with one less
        tell(f"this host offers {meeting.slots} processes from now on.")
    time.sleep(history.pause)


def _choose_interface(place: Place, address: str) -> None:
    """Have the workers' collectives listen where the other hosts reach this one, and nowhere else."""
    if place.round.address != LOOPBACK and (name := interface_of(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _given_up(ended: RoundEnd, history: History, logs: Path) -> str:
    said = worker_sentence(ended.output)
    return (
        f"Gave up after {history.vain} tries that came no further than step {history.best}; the last time "
        f"{ended.reason}{': ' + said if said else '.'} All output is in {logs}; the same command goes on "
        "from the newest checkpoint."
    )


def _log_folder(logs: Path, place: Place, private: Path) -> Path:
    """Make the folder for the output of this round; a private one where the disk of the run is full."""
    number = place.round.number
    while len(place.round.seats) == 1 and (logs / f"round-{number:06d}").exists():
        number += 1  # the rounds of an earlier launch on one host began at 1 too
    folder = logs / f"round-{number:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(dir=private))
    return folder


def _opening(place: Place, logs: Path) -> str:
    seats = place.round.seats
    shares = ", ".join(f"{seat.host}: {seat.processes}" for seat in seats)
    hosts = "1 host" if len(seats) == 1 else f"{len(seats)} hosts"
    count = place.round.processes
    return f"{count} process{'es' if count > 1 else ''} on {hosts} ({shares}); output in {logs}"


class _Stop:
    """How often this process was asked to stop; a second Ctrl-C counts, a second SIGTERM does not."""

    def __init__(self) -> None:
        self.count = 0

    def ask(self, number: int, _: FrameType | None) -> None:
        self.count = self.count + 1 if number == signal.SIGINT else max(1, self.count)


def _raise_if_stopped(stop: _Stop) -> None:
    if stop.count > 1:
        raise Interrupted("Killed; the same command goes on from the newest checkpoint.")
    if stop.count:
        raise Interrupted("Stopped; the same command goes on from here.")


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
