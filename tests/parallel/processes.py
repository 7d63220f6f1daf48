"""A pool of processes that stand ready, so that a test of many layouts pays for starting them once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from liaoyuan.device import Device
from liaoyuan.parallel import World, start

TIMEOUT_S = 120


class Pool:
    """Runs `job(world, *arguments)` in `size` processes that form a process group, and returns what each gave."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def run(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results in the order of the processes; raises what one of them raised."""
        port, chosen = free_port(), self._connections[:size]
        for rank, connection in enumerate(chosen):
            connection.send((rank, size, port, job, arguments))
        answers = []
        for connection in chosen:
            assert connection.poll(TIMEOUT_S), "a process does not answer: the layout hangs"
            answers.append(connection.recv())
        failures = [text for failed, text in answers if failed]
        assert not failures, failures[0]
        return [value for _, value in answers]


@contextmanager
def pool(size: int) -> Iterator[Pool]:
    """Start `size` processes and end them."""
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe() for _ in range(size)]
    processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    try:
        yield Pool([ours for ours, _ in pairs])
    finally:
        for process in processes:
            process.kill()


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
