"""A pool of processes that stand ready, so that a test of many layouts pays for starting them once."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from liaoyuan.device import Device
from liaoyuan.parallel import World, start

TIMEOUT_S = 60


class Pool:
    """Runs `job(world, *arguments)` in processes that form a process group, and returns what each gave."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._start()

    def run(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results in the order of the processes; raises what one of them raised."""
        port, chosen = free_port(), self._connections[:size]
        for rank, connection in enumerate(chosen):
            connection.send((rank, size, port, job, arguments))
        answers, failures, end = [], [], time.monotonic() + TIMEOUT_S
        while len(answers) < size and not failures and time.monotonic() < end:
            for connection in wait(chosen, timeout=1):
                failed, value = connection.recv()
                answers.append((connection, value))
                failures += [value] if failed else []
        if len(answers) < size or failures:  # the others wait for ever
            self.stop()
            self._start()
            raise AssertionError(failures[0] if failures else "a process does not answer: the layout hangs")
        return [value for _, value in sorted(answers, key=lambda one: chosen.index(one[0]))]

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        pairs = [context.Pipe() for _ in range(self._size)]
        self._connections = [ours for ours, _ in pairs]
        self._processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


@contextmanager
def pool(size: int) -> Iterator[Pool]:
    """Start `size` processes and end them."""
    ready = Pool(size)
    try:
        yield ready
    finally:
        ready.stop()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        rank, size, port, job, arguments = connection.recv()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        try:
            world = start(Device("cpu"))
            connection.send((False, job(world, *arguments)))
        except Exception:
            connection.send((True, f"process {rank}:\n{traceback.format_exc()}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = ["Pool", "World", "free_port", "pool"]
