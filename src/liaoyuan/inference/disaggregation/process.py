"""Workers in processes of their own, which end with the one that started them, however that ends."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from liaoyuan.checkpoint import load_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.device import select_device
from liaoyuan.inference.constraints.specification import Constraints
from liaoyuan.inference.disaggregation.worker import Worker
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.runner import EngineThread
from liaoyuan.inference.sizes import EngineConfig
from liaoyuan.models import Quantisation


@dataclass(frozen=True)
class Task:
    """What a worker process must know, as JSON's types.

    socket: where it listens; whoever may enter the folder of it may ask: keep that private. config: of an
    `EngineConfig`; quantisation: of a `Quantisation`. adapters: folders by name. threads: None: as many as usual.
    shared_folder: whether the socket's folder holds nothing but sockets of workers, the last of which removes it.
    """

    folder: str
    socket: str
    config: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    lease_seconds: float = 10.0
    max_queued: int = 256
    draft: str | None = None
    quantisation: Mapping[str, Any] | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    shared_folder: bool = False


def worker_command(task: Task) -> list[str]:
    """Return the command of a worker process. It writes a line of JSON, its socket as "url", when it is ready, and
    ends when its standard input does.
    """
    return [sys.executable, "-m", "liaoyuan.cli.engine_worker", json.dumps(asdict(task))]


def start_worker(
    folder: Path, socket: Path, config: EngineConfig = EngineConfig(), lease_seconds: float = 10.0
) -> "subprocess.Popen[bytes]":
    """Start a process that serves a model folder as a `Worker` at a Unix socket; it ends with this one.

    The socket is there when the worker is ready.
    """
    socket.unlink(missing_ok=True)  # a killed worker leaves its own
    task = Task(str(folder), str(socket), config.model_dump(), lease_seconds=lease_seconds)
    return subprocess.Popen(worker_command(task), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def run_worker(task: Task, ready: Callable[[], None], ended: threading.Event) -> None:
    """Serve as a worker until `ended` is set; call `ready` when others may ask.

    Raises:
        LiaoyuanError: the model cannot be loaded, or an engine like this cannot hand over blocks.
    """
    engine = _open_engine(task)
    with EngineThread(engine, task.max_queued) as runner:
        constraints = Constraints(lambda: Tokenizer.load(Path(task.folder)))
        asyncio.run(_serve(Worker(engine, runner, task.lease_seconds, constraints), Path(task.socket), ready, ended))
    if task.shared_folder:
        with contextlib.suppress(OSError):  # it is not empty, or it has gone
            Path(task.socket).parent.rmdir()


def _open_engine(task: Task) -> Engine:
    config, place = EngineConfig(**task.config), select_device(task.device).torch
    how = None if task.quantisation is None else Quantisation(**task.quantisation)
    small = None if task.draft is None else load_model(Path(task.draft), device=place)
    further = config.speculate == "mtp"
    model = load_model(Path(task.folder), device=place, quantisation=how, further=further)
    engine = Engine(model.eval(), config, small)
    for name, folder in task.adapters.items():
        engine.load_adapter(name, Path(folder))
    return engine


async def _serve(worker: Worker, socket: Path, ready: Callable[[], None], ended: threading.Event) -> None:
    await worker.prepare()
    with contextlib.suppress(FileNotFoundError):
        socket.unlink()
    async with worker.listen(socket):
        ready()
        await asyncio.to_thread(ended.wait)
