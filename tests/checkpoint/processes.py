"""Forks of the test's process that form a gloo group: torch is loaded already, so that they start at once."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from liaoyuan import ops
from liaoyuan.device import Device
from liaoyuan.parallel import start
from tests.parallel.processes import free_port


def together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(world, *arguments)` in `size` processes of one group; fails as they do."""
    codes = exit_codes(size, work, *arguments)
    assert codes == [0] * size, f"exit codes {codes}"


def exit_codes(size: int, work: Callable[..., None], *arguments: Any) -> list[int | None]:
    processes = begin(size, work, *arguments)
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def begin(size: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    ops.status()  # built and tested once: each process would test the kernels anew otherwise
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [context.Process(target=_run, args=(rank, size, port, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def _run(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    world = start(Device("cpu"))
    try:
        work(world, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # not in a collective that the others have left
    world.close()
