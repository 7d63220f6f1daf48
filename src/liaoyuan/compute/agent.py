"""One round on this host, by the elastic agent of torch: start the workers, wait for their end, say how it came.

Rounds, their store and restarts are ours (`meeting`, `launcher`). torch's own rendezvous compares the clocks of hosts,
lives on one of them, and hands a store with the keys of the last attempt to the next (docs/launch.md has the figures);
here each round has a store of its own, opened by its first host on a port that the kernel chose.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # (public, but not in __all__)
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from liaoyuan.compute.meeting import Place

STORE_TIMEOUT = timedelta(seconds=60)
SAVE_TIMEOUT = 300  # seconds that workers have for saving when they are asked to end
EXIT_BARRIER = 5.0  # seconds that torch's agents wait for each other; ours wait in `Meeting.finish`
NAME = "liaoyuan"


@dataclass(frozen=True)
class Ended:
    """How a round ended here. `failures`: rank -> (exit code, moment), in the order of time."""

    succeeded: bool
    failures: dict[int, int] = field(default_factory=dict)


class Round:
    """The workers of this host in one round."""

    def __init__(self, place: Place, command: Sequence[str], logs: Path, is_over: Callable[[], bool]) -> None:
        """`command` is what each worker runs, `is_over` whether the hosts have agreed to end the round."""
        _quiet()
        self._agent: LocalElasticAgent | None = None
        self._place, self._command, self._logs, self._is_over = place, command, logs, is_over

    def run(self) -> Ended:
        """Run the workers to their end, well or not."""
        try:
            store = open_store(self._place)
            self._agent = self._make_agent(store)
            result: RunResult | None = self._agent.run()
        except DistError:
            return Ended(False)  # the first host of the round went before it began
        if result is None or result.is_failed():
            failures = result.failures if result else {}
            ordered = sorted(failures.items(), key=lambda item: item[1].timestamp)
            return Ended(False, {rank: failure.exitcode for rank, failure in ordered})
        return Ended(True)

    def pids(self) -> dict[int, int]:
        """Return the process of each rank of this host that has been started."""
        if self._agent is None:
            return {}
        workers = self._agent.get_worker_group().workers
        return {worker.global_rank: worker.id for worker in workers if isinstance(worker.id, int)}

    def _make_agent(self, store: TCPStore) -> LocalElasticAgent:
        spec = WorkerSpec(
            role=NAME,
            local_world_size=self._place.processes,
            entrypoint=self._command[0],
            args=tuple(self._command[1:]),
            rdzv_handler=_Rendezvous(self._place, store, self._is_over),
            max_restarts=0,
            monitor_interval=0.1,
        )
        return LocalElasticAgent(
            spec,
            RankLogs(self._logs),
            exit_barrier_timeout=EXIT_BARRIER,
            log_line_prefix_template="[rank ${rank}] ",
            shutdown_timeout=SAVE_TIMEOUT,
        )


class RankLogs(LogsSpecs):
    """A worker's output goes to `rank-0001.out` and `.err` of the round's folder, and from there to our own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        files = {rank: self._folder / f"rank-{int(env['RANK']):04d}" for rank, env in envs.items()}
        out = {rank: f"{file}.out" for rank, file in files.items()}
        err = {rank: f"{file}.err" for rank, file in files.items()}
        nothing = dict.fromkeys(envs, os.devnull)
        return LogsDest(out, err, dict(out), dict(err), nothing, os.devnull, os.devnull)

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)


class _Rendezvous(RendezvousHandler):
    """Hands torch's agent the round that the hosts have agreed on, once; then the agent ends."""

    def __init__(self, place: Place, store: TCPStore, is_over: Callable[[], bool]) -> None:
        self._place, self._store, self._is_over = place, store, is_over
        self._used = False

    def next_rendezvous(self) -> RendezvousInfo:
        if self._used:
            raise RendezvousGracefulExitError("The round is over.")
        self._used = True
        found = self._place.round
        where = RendezvousStoreInfo(found.address, found.port)
        return RendezvousInfo(self._store, self._place.index, len(found.seats), where)

    def num_nodes_waiting(self) -> int:
        return int(self._is_over())

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._is_over()

    def set_closed(self) -> None:
        pass

    def get_run_id(self) -> str:
        return f"round-{self._place.round.number:06d}"

    def shutdown(self) -> bool:
        return True


def open_store(place: Place) -> TCPStore:
    """Open the store of a round on its first host, or connect to it. It listens on the round's address alone."""
    found, listener = place.round, place.listener
    if listener is None:
        return TCPStore(found.address, found.port, is_master=False, timeout=STORE_TIMEOUT)
    return TCPStore(
        found.address,
        found.port,
        is_master=True,
        timeout=STORE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _quiet() -> None:
    """What torch's agent has to say is said by us in sentences; signals are ours too."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # the lines of many workers, one at a time
