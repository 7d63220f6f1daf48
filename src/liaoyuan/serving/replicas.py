"""The replicas behind one address: each is a `liaoyuan serve` of its own on a free port of the loopback, or a worker
that answers in another way (`Line`).

A thread watches each: one that ends, or does not answer when asked how it is, is started again and brought into the
state of the others. A replica's standard input is a pipe of ours: it ends when that closes, however we end.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from liaoyuan.errors import LiaoyuanError

PROBE_SECONDS = 5.0  # between two questions how a replica is
PATIENCE_SECONDS = 30.0  # within which it must answer one
END_SECONDS = 10.0  # that a replica may take to end after it was told to
SHORT_LIFE_SECONDS = 30.0  # who ends sooner is started again after a pause, which grows
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class Call:
    """An HTTP request with its whole body, as it goes to a replica; target: path and query."""

    method: str
    target: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


class Line(Protocol):
    """How processes are spoken to, at the address that each says when it is ready."""

    probe_seconds: float  # between two questions how one is

    def send(self, address: str, call: Any) -> None:
        """Make a call that changes its state; raises LiaoyuanError, OSError or httpx.HTTPError if it does not."""
        ...

    def is_well(self, address: str) -> bool:
        """Return whether it answers that it lives."""
        ...


class Http:
    """The line to a `liaoyuan serve`."""

    probe_seconds = PROBE_SECONDS

    def send(self, address: str, call: Any) -> None:
        send_call(address, call).raise_for_status()

    def is_well(self, address: str) -> bool:
        try:
            reply = httpx.get(address + "/health", timeout=PATIENCE_SECONDS, trust_env=False)
        except httpx.HTTPError:
            return False
        state: Any = reply.json()
        return bool(state.get("alive", True))


@dataclass
class Replica:
    """One of the processes. busy: requests that it has from us. url: where it listens; "" while it starts."""

    number: int
    command: list[str]
    environment: Mapping[str, str]
    url: str = ""
    busy: int = 0
    starts: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    name: str = "A replica"
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def start(self) -> str:
        """Start the process and return where it listens.

        Raises:
            LiaoyuanError: it ended before it could serve; its words are on our standard error.
        """
        with self.lock:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.environment,
                start_new_session=True,  # Ctrl-C is for us, who end it
            )
        self.starts += 1
        assert self.process.stdout
        line = self.process.stdout.readline()
        try:
            return str(json.loads(line)["url"])
        except (ValueError, KeyError):
            self.process.wait()
            raise LiaoyuanError(f"{self.name} ended before it could serve; what it said is above.") from None

    def kill(self) -> None:
        """End the process at once; another one takes its place."""
        self.url = ""
        with self.lock:
            if self.process:
                self.process.kill()

    def end(self, patience: float = END_SECONDS) -> None:
        """Let the process end, or kill it if it takes longer than `patience` seconds."""
        self.url = ""
        with self.lock:
            process = self.process
        if process is None:
            return
        assert process.stdin and process.stdout
        process.stdin.close()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Replicas:
    """All replicas, started when the block begins and ended when it ends; and the calls that brought them into the
    state in which they are, newest last.
    """

    def __init__(
        self,
        commands: Sequence[list[str]],
        environments: Sequence[Mapping[str, str]],
        line: Line = Http(),
        names: Sequence[str] = (),
    ) -> None:
        """names: what errors call them, if not replicas."""
        pairs = zip(commands, environments, strict=True)
        self.all = [Replica(number, *pair, name=f"Replica {number}") for number, pair in enumerate(pairs)]
        for replica, name in zip(self.all, names, strict=False):
            replica.name = name
        self._line = line
        self.state: dict[str, Any] = {}  # by what they decide
        self.changing = threading.RLock()  # held while a call goes to all, and while one that is new catches up
        self.renewed: Callable[[int], None] = lambda number: None  # is told that a replica has nothing any more
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._keep, args=(one,), daemon=True) for one in self.all]
        self._first = threading.Barrier(len(self.all) + 1)
        self._failures: list[LiaoyuanError] = []

    def __enter__(self) -> "Replicas":
        for thread in self._threads:
            thread.start()
        try:
            self._first.wait()
            if self._failures:
                raise self._failures[0]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._first.abort()
        ending = [threading.Thread(target=replica.end) for replica in self.all]
        for thread in ending:
            thread.start()
        for thread in [*ending, *self._threads]:
            thread.join()

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.all if replica.url]

    def _keep(self, replica: Replica) -> None:
        """Keep a replica alive until the end."""
        try:
            url = replica.start()
        except LiaoyuanError as error:
            self._failures.append(error)
        try:
            self._first.wait()
        except threading.BrokenBarrierError:
            return
        if self._failures:
            return
        pause, born = 0.0, time.monotonic()
        while not self._closing.is_set():
            if self._catch_up(replica, url):
                self._watch(replica, url)
            replica.end(0.0)
            lived = time.monotonic() - born
            pause = min(LONGEST_PAUSE_SECONDS, 2 * pause + 1) if lived < SHORT_LIFE_SECONDS else 0.0
            if self._closing.wait(pause if replica.starts > 1 else 0.0):
                return
            born = time.monotonic()
            url = self._start_again(replica)

    def _start_again(self, replica: Replica) -> str:
        self.renewed(replica.number)
        try:
            url = replica.start()
        except LiaoyuanError:
            url = ""
        if self._closing.is_set():  # it was not there to be ended
            replica.end(0.0)
        return url

    def _catch_up(self, replica: Replica, url: str) -> bool:
        """Bring a new replica into the state of the others and let it serve; False if it cannot."""
        if not url:
            return False
        with self.changing:
            try:
                for call in self.state.values():
                    self._line.send(url, call)
            except (httpx.HTTPError, LiaoyuanError, OSError):
                return False
            if replica.starts > 1 and not self._line.is_well(url):
                return False
            replica.url = url
            return True

    def _watch(self, replica: Replica, url: str) -> None:
        """Wait until a replica has ended, or must be ended."""
        assert replica.process
        while not self._closing.is_set():
            try:
                replica.process.wait(self._line.probe_seconds)
                return
            except subprocess.TimeoutExpired:
                if not self._line.is_well(url):
                    return


def send_call(url: str, call: Call) -> httpx.Response:
    """Make a call that changes a replica's state; it may take as long as reading weights does."""
    return httpx.request(
        call.method,
        url + call.target,
        content=call.body,
        headers=[pair for pair in call.headers if pair[0].lower() != b"content-length"],
        timeout=None,
        trust_env=False,
    )


def replica_environment(number: int, processes: int, threads: int) -> dict[str, str]:
    """Return the environment of a replica of so many processes, whose accelerators follow those of the one before it,
    and which have so many threads together.
    """
    return {**os.environ, "LOCAL_RANK": str(number * processes), "OMP_NUM_THREADS": str(threads)}
