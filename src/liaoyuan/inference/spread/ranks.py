"""The processes of one replica: the leader, which is the process that asks for them, starts the others, its followers.

They meet on a port of the loopback that the system chose. Each reads its own part of the weights. A follower ends when
the leader does, however that ends; when a follower ends first, the leader is told.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import ProcessGroup

from liaoyuan.checkpoint import load_weights, quantisation_for
from liaoyuan.device import select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.further_draft import check_further
from liaoyuan.inference.spread.balance import Balancing, check_balancing
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.models import Decoder, Quantisation, read_config
from liaoyuan.ops import seek_exactness
from liaoyuan.parallel import Layout, Program, World, check_inference, lay_out_inference

HOST = "127.0.0.1"
START_TIMEOUT = timedelta(minutes=5)  # until all processes have imported what they need and read their weights
STEP_TIMEOUT = timedelta(minutes=5)  # of an exchange within a step: a process that hangs so long is given up
IDLE_TIMEOUT = timedelta(days=3650)  # of the wait for the next step
END_SECONDS = 10.0  # that processes may take to end after they were told to, or after one of them failed
FIND_SECONDS = 2.0  # until the death of a process is known to have broken a connection

Tell = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """What a process must know to join a replica; `port` of the loopback is where all meet."""

    folder: str
    tp: int
    ep: int
    device: str
    port: int
    threads: int
    step_seconds: float
    quantise: dict[str, Any] | None  # how to quantise the weights while they are read
    further: bool  # with the layers that guess further
    exact: bool = False
    dtype: str | None = None
    rank: int = 0
    expert_copies: int = 0

    @property
    def few_bits(self) -> Quantisation | None:
        """How the model keeps its weights: as the folder does, or as it is asked to."""
        return quantisation_for(Path(self.folder), None if self.quantise is None else Quantisation(**self.quantise))


@contextmanager
def open_ranks(
    folder: Path,
    layout: Layout,
    device: str,
    failed: Tell,
    step_timeout: timedelta = STEP_TIMEOUT,
    quantisation: Quantisation | None = None,
    further: bool = False,
    dtype: str | None = None,
    balancing: Balancing = Balancing(),
) -> Iterator[Leader]:
    """Start the followers of this process, load the model of `folder` in all, and end them when the block ends.

    Args:
        layout: its axes tp and ep count, and whether it is exact.
        device: its kind; each process takes the one of its own number.
        balancing: how experts are spread over the processes.
        failed: called once, from another thread, with a sentence, when a process fails before the block ends. If the
            block has not ended END_SECONDS later, this process does.
        quantisation: quantise the weights while they are read.
        further: with the model's layers for predicting the token after the next.
        dtype: of the weights; None: the model's own.

    Raises:
        LiaoyuanError: the layout does not fit the model, or that has no such layers, or a process could not start or
            read its weights.
    """
    check_balancing(balancing, layout)
    few_bits = quantisation_for(folder, quantisation)
    if few_bits is not None and balancing != Balancing():
        raise LiaoyuanError(
            "Experts of few bits have no copies and do not move: leave out --expert-copies and --rebalance-every, or "
            "take the weights whole."
        )
    config = read_config(folder, further)
    if further:
        check_further(config)
    layout = check_inference(layout, config, few_bits, balancing.copies)
    with contextlib.ExitStack() as opened:
        bound = opened.enter_context(socket.create_server((HOST, 0)))  # it is there when the followers come
        threads, seconds = max(1, torch.get_num_threads() // layout.tp), step_timeout.total_seconds()
        how = None if quantisation is None else asdict(quantisation)
        port = bound.getsockname()[1]
        task = Task(
            str(folder),
            layout.tp,
            layout.ep,
            device,
            port,
            threads,
            seconds,
            how,
            further,
            layout.exact,
            dtype,
            expert_copies=balancing.copies,
        )
        followers = opened.enter_context(_Followers(task, failed))
        program, control = followers.while_alive(lambda: join(task, bound))
        opened.callback(dist.destroy_process_group)
        leader = Leader(program, control, followers.fail, balancing.seconds)
        opened.callback(followers.end, leader)
        followers.watch()
        yield leader


def join(task: Task, bound: socket.socket | None = None) -> tuple[Program, ProcessGroup]:
    """Join the other processes and read this one's part of the weights; the group is the one for announcements.

    bound: the socket on which the first process lets the others meet.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # processes of one machine need no network
    device, layout = select_device(task.device), Layout(tp=task.tp, ep=task.ep, fsdp=1, exact=task.exact)
    if layout.exact:
        seek_exactness()
    if device.is_cpu:  # the processes share its cores
        torch.set_num_threads(task.threads)
    listening: dict[str, Any] = {} if bound is None else {"is_master": True, "master_listen_fd": bound.detach()}
    store = TCPStore(HOST, task.port, task.tp, timeout=START_TIMEOUT, wait_for_workers=False, **listening)
    dist.init_process_group(
        device.collective_backend,
        store=store,
        rank=task.rank,
        world_size=task.tp,
        timeout=timedelta(seconds=task.step_seconds),
    )
    control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    assert control is not None
    world = World(task.rank, task.tp, device).arrange(layout)
    config = read_config(Path(task.folder), task.further)
    with torch.device("meta"):
        model = Decoder(replace(config, dtype=task.dtype) if task.dtype else config).eval()
    with _telling_of_memory(task.expert_copies):
        program = lay_out_inference(model, layout, world, task.few_bits, task.expert_copies)
    load_weights(program, Path(task.folder))
    dist.barrier(control)
    return program, control


@contextmanager
def _telling_of_memory(expert_copies: int) -> Iterator[None]:
    """Raise LiaoyuanError where there is not enough of it."""
    try:
        yield
    except RuntimeError as error:  # torch's own word for it is one too
        if "memory" not in str(error):
            raise
        fewer = " Give less to copies of experts (--expert-copies)." if expert_copies else ""
        raise LiaoyuanError(f"There is not enough memory for this process's part of the model.{fewer}") from error


class _Followers:
    """The other processes. Each has a pipe of ours for standard input, which closes when we end."""

    def __init__(self, task: Task, failed: Tell) -> None:
        self._failed, self._ending = failed, threading.Event()
        self._once = threading.Lock()
        first = int(os.environ.get("LOCAL_RANK", "0"))
        self._processes = {
            rank: subprocess.Popen(
                [sys.executable, "-m", "liaoyuan.cli.follower", json.dumps(asdict(task) | {"rank": rank})],
                stdin=subprocess.PIPE,
                env={**os.environ, "LOCAL_RANK": str(first + rank)},
                start_new_session=True,  # Ctrl-C is for the leader, which ends them
            )
            for rank in range(1, task.tp)
        }

    def __enter__(self) -> "_Followers":
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for process in self._processes.values():
            process.kill()
            process.wait()
            assert process.stdin
            process.stdin.close()

    def while_alive(self, work: Callable[[], Result]) -> Result:
        """Return `work()`, done in another thread, as it could wait for a process that has ended.

        Raises:
            LiaoyuanError: a process has ended.
        """
        answers: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="joining", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if why := self._first_gone():
                raise LiaoyuanError(f"{why} before it was ready; what it said is above.")
        for error in errors:
            raise error
        return answers[0]

    def watch(self) -> None:
        """Say it when a process ends."""
        for process in self._processes.values():
            threading.Thread(target=self._wait_for, args=(process,), name="followers", daemon=True).start()

    def fail(self, why: str) -> None:
        """Say once why the processes cannot go on; end this one if nothing comes of it."""
        if not self._ending.is_set() and self._once.acquire(blocking=False):
            threading.Thread(target=self._fail, args=(why,), name="failure", daemon=True).start()

    def end(self, leader: Leader) -> None:
        """Let all end."""
        self._ending.set()
        with contextlib.suppress(Exception):  # who cannot be told is killed
            leader.close()
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.0 if leader.failure else max(0.0, deadline - time.monotonic()))

    def _wait_for(self, process: "subprocess.Popen[bytes]") -> None:
        process.wait()
        self.fail("")

    def _fail(self, why: str) -> None:
        deadline = time.monotonic() + FIND_SECONDS
        while not (gone := self._first_gone()) and time.monotonic() < deadline:
            time.sleep(0.05)
        sentence = f"{gone or f'The processes of the model failed ({why})'}. The others cannot go on without it."
        self._failed(sentence)
        if not self._ending.wait(END_SECONDS):
            print(f"liaoyuan: {sentence}", file=sys.stderr, flush=True)
            os._exit(1)

    def _first_gone(self) -> str:
        """Return who has ended and how, or nothing."""
        for rank, process in self._processes.items():
            if (code := process.poll()) is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with the code {code}"
                return f"Process {rank} of {len(self._processes) + 1} of the model {how}"
        return ""
