"""Jobs on several processes that form a process group."""

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo  # forks that train find it loaded: each would load it alone otherwise
import torch.distributed as dist

from liaoyuan import ops
from liaoyuan.cli.main import app
from liaoyuan.device import Device
from liaoyuan.parallel import World, start

TIMEOUT_S = 60


def run(size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `job(world, *arguments)` gives in each of `size` forked processes; raises what one of them raised."""
    ops.status()  # built and tested once: each process would test the kernels anew otherwise
    context, port = multiprocessing.get_context("fork"), free_port()
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_run, args=(theirs, rank, size, port, job, arguments), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    gc.freeze()  # process groups of the past are none of theirs: they would wait for threads that were not forked
    for process in processes:
        process.start()
    gc.unfreeze()
    try:
        return _answers([ours for ours, _ in pairs])
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_verb(size: int, *words: object) -> list[str]:
    """Run a verb of the command line in each of `size` forked processes, as a launcher would; return what they say."""
    return run(size, _say, [str(word) for word in words])


def _say(_: World, words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        app(words, standalone_mode=False)
    return said.getvalue()


def _answers(connections: list[Connection]) -> list[Any]:
    answers, end = {}, time.monotonic() + TIMEOUT_S
    while len(answers) < len(connections):
        for connection in wait([one for one in connections if one not in answers], timeout=1):
            assert isinstance(connection, Connection)
            failed, answers[connection] = pickle.loads(connection.recv_bytes())
            if failed:
                raise AssertionError(answers[connection])
        if time.monotonic() > end:
            raise AssertionError("a process does not answer: it hangs")
    return [answers[connection] for connection in connections]


def _run(*arguments: Any) -> None:
    """Do a rank's part in a thread of its own, which remembers nothing.

    PyTorch keeps for each thread what it has worked out for sharded tensors, and takes an equal mesh for the same: a
    process that is forked from one that was rank 0 of such a mesh would have rank 0's part of weights whose shape that
    one had seen.
    """
    thread = threading.Thread(target=_work, args=arguments, daemon=True)
    thread.start()
    thread.join()


def _work(
    connection: Connection, rank: int, size: int, port: int, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(TIMEOUT_S - 5, file=sys.__stderr__)  # where it hangs, if it does
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        world = start(Device("cpu"))
        connection.send_bytes(pickle.dumps((False, job(world, *arguments))))  # by value: the process ends
    except Exception:
        connection.send_bytes(pickle.dumps((True, f"process {rank}:\n{traceback.format_exc()}")))
    finally:
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still reads from it
            dist.destroy_process_group()


def free_port() -> int:
    """Return a port that nobody listens on, below those that the system gives to outgoing connections meanwhile."""
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
