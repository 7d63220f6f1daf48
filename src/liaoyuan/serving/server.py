"""A server around a model folder: checked at the door, bound to loopback unless told otherwise."""

import asyncio
import contextlib
import dataclasses
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

import uvicorn
from starlette.types import ASGIApp

from liaoyuan.checkpoint import load_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.device import select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, EngineThread, Pooling, read_pooling
from liaoyuan.inference.disaggregation.process import Task
from liaoyuan.inference.spread.balance import Balancing, check_balancing
from liaoyuan.inference.spread.ranks import open_ranks
from liaoyuan.models import Quantisation, read_config
from liaoyuan.parallel import Layout, check_inference
from liaoyuan.serving.about import About, read_about
from liaoyuan.serving.adapters import Known, Shelf
from liaoyuan.serving.apart import Sides, open_apart
from liaoyuan.serving.app import build_app
from liaoyuan.serving.connections import PatientProtocol
from liaoyuan.serving.front import MOST_BODY_BYTES, Front
from liaoyuan.serving.generation import Runner
from liaoyuan.serving.replicas import Replicas, replica_environment
from liaoyuan.serving.security import Access
from liaoyuan.serving.settings import Settings
from liaoyuan.serving.unready import answering_unready

MOST_PADDING = 1024  # rows that a model's embedding may have beyond the tokenizer's ids (padded for speed)
GRACE_SECONDS = 2  # how long open answers may go on after Ctrl-C
DRAIN_SECONDS = 25.0  # the same after SIGTERM; what sends it kills after 30, as a rule
LOOK_SECONDS = 0.05  # between two looks at whether all have ended
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Failure:
    """Why a server cannot go on, as soon as it cannot; may be told by any thread, before the server is there too."""

    def __init__(self) -> None:
        self.why = ""
        self._stop: Callable[[], None] = lambda: None

    def __call__(self, why: str) -> None:
        self.why = why
        self._stop()

    def ends(self, stop: Callable[[], None]) -> None:
        """Let it call `stop`."""
        self._stop = stop
        if self.why:
            stop()


class Server:
    """An app on a listening socket, and what else ends with it; `run` serves until Ctrl-C, `stop` or a failure."""

    def __init__(
        self,
        app: ASGIApp,
        bound: socket.socket,
        closing: contextlib.ExitStack,
        failure: Failure | None = None,
        further: Sequence[socket.socket] = (),
    ) -> None:
        """further: sockets of other addresses at which it listens too."""
        self.app, self._failure = app, failure or Failure()
        self._sockets, self._closing = [bound, *further], closing
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        self._uvicorn = _Uvicorn(config, closing)
        self._failure.ends(self.stop)

    @property
    def url(self) -> str:
        """Return the (first) address, such as http://127.0.0.1:8000."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until Ctrl-C (which is a clean end) or `stop` from another thread; then close everything.

        Raises:
            LiaoyuanError: a failure has ended it.
        """
        try:
            self._uvicorn.run(sockets=self._sockets)
        except KeyboardInterrupt:
            pass
        finally:
            self.close()
        if self._failure.why:
            raise LiaoyuanError(self._failure.why)

    def stop(self) -> None:
        """Make `run` return soon."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Free the port and end the engine; `run` does it itself."""
        self._closing.close()
        for bound in self._sockets:
            bound.close()

    def __enter__(self) -> "Server":
        """Serve in a thread of its own until the block ends."""
        self._thread = threading.Thread(target=self.run, name="server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self._thread.join()


class _Uvicorn(uvicorn.Server):
    """Ends the engine before it waits for open answers, so that they end at once and say why; but after SIGTERM, which
    is how a server is replaced, it takes no new connections and lets open answers come to their end first.
    """

    def __init__(self, config: uvicorn.Config, closing: contextlib.ExitStack) -> None:
        super().__init__(config)
        self._closing, self._draining = closing, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._draining = sig == signal.SIGTERM and not self.should_exit  # whoever asks again does not want to wait
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        end = time.monotonic() + DRAIN_SECONDS
        while self._draining and self.server_state.tasks and time.monotonic() < end:
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.to_thread(self._closing.close)
        await super().shutdown(sockets)


def open_server(
    model_dir: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    name: str | None = None,
    about: About | None = None,
    engine: EngineConfig = EngineConfig(),
    access: Access = Access(),
    max_queued: int = 256,
    context_length: int | None = None,
    call_format: str | None = None,
    control: bool = False,
    layout: Layout = Layout(),
    draft: Path | None = None,
    quantisation: Quantisation | None = None,
    adapters: Mapping[str, Path] = {},
    adapter_folder: Path | None = None,
    thinking: bool = True,
    sides: Sides | None = None,
    settings: Settings = Settings(),
    balancing: Balancing = Balancing(),
) -> Server:
    """Load the model of a Hugging Face folder and return a server that holds the port (0: any free one).

    Args:
        host: an address, or several with commas between, at all of which it listens.
        name: what the API calls the model; the folder's name if None.
        call_format: how the model writes tool calls; None: see its chat template.
        control, thinking: see `build_app`.
        about: what the chat page says; read from the folder's `liaoyuan.json` if None.
        layout: over how many processes, of which this is the first, the model is spread: its axes tp and ep.
        access: who may ask, and how much; on a loopback address only requests that name it are answered.
        max_queued: requests that may wait beyond those that the engine runs at once.
        context_length: the most tokens of a request; as many as model and cache hold if None.
        draft: folder of a small model that guesses next tokens.
        quantisation: keep the weights in few bits.
        adapters: low-rank adapters to begin with, each a folder by its name.
        adapter_folder: whoever may ask may load adapters from inside it; None: from nowhere.
        sides: so many other processes compute prompts, and so many decode; None: this one does both.
        settings: what it does where requests leave it open.
        balancing: how the experts of a model over several processes are spread.

    Raises:
        LiaoyuanError: the port is in use, a folder is missing or torn, or tokenizer and model disagree.
    """
    if adapter_folder is not None and not adapter_folder.is_dir():
        raise LiaoyuanError(f"The folder {adapter_folder} of --lora-folder does not exist; make it first.")
    with contextlib.ExitStack() as port_kept, contextlib.ExitStack() as opened:
        bound, *further = _bind_all(host, port, port_kept)
        with answering_unready(bound):
            tokenizer, failure, config = _load_tokenizer(model_dir), Failure(), read_config(model_dir)
            few = (draft, quantisation, adapters)
            check_balancing(balancing, layout)
            if sides is not None:
                _refuse_sleep(settings)
                apart = opened.enter_context(
                    open_apart(_task(model_dir, device, engine, max_queued, sides, *few), sides)
                )
                behind = _Behind(apart, apart, apart.room)
            else:
                running = _open_engine(model_dir, device, engine, layout, failure, opened, *few, balancing)
                runner = opened.enter_context(EngineThread(running, max_queued, settings.sleep_after, model_dir))
                behind = _Behind(runner, running.adapters, running.room)
            eos = config.eos_token_id
            app = build_app(
                behind.runner,
                tokenizer,
                name or model_dir.resolve().name,
                _context_length(behind.room, context_length),
                about or read_about(model_dir),
                () if eos is None else (eos,),
                dataclasses.replace(access, loopback_only=is_loopback(host)),
                Pooling(settings.pooling) if settings.pooling else read_pooling(model_dir),
                config.vocab_size,
                call_format,
                control,
                Shelf(behind.known, adapter_folder),
                thinking,
                settings,
            )
        port_kept.pop_all()
        return Server(app, bound, opened.pop_all(), failure, further)


def open_front(
    model_dir: Path,
    command: list[str],
    replicas: int,
    layout: Layout,
    threads: int,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_body_bytes: int = MOST_BODY_BYTES,
    balancing: Balancing = Balancing(),
) -> Server:
    """Start replicas of a server, each its own process or `layout.tp` of them, and return a server that hands each
    request to one of them.

    Args:
        command: that starts one replica, which says where it listens as a line of JSON.
        threads: of each replica.
        balancing: of the experts of each replica.

    Raises:
        LiaoyuanError: the port is in use, the layout does not fit the model, or a replica could not start.
    """
    check_balancing(balancing, layout)
    check_inference(layout, read_config(model_dir), expert_copies=balancing.copies)
    with contextlib.ExitStack() as port_kept, contextlib.ExitStack() as opened:
        bound, *further = _bind_all(host, port, port_kept)
        environments = [replica_environment(number, layout.tp, threads) for number in range(replicas)]
        with answering_unready(bound):
            running = opened.enter_context(Replicas([command] * replicas, environments))
        front = Front(running, max_body_bytes, LOOPBACK if is_loopback(host) else ())
        port_kept.pop_all()
        return Server(front, bound, opened.pop_all(), further=further)


@dataclasses.dataclass(frozen=True)
class _Behind:
    """What is behind an app: who answers, who knows the adapters, and the most tokens of a request."""

    runner: Runner
    known: Known
    room: int


def _task(
    model_dir: Path,
    device: str,
    config: EngineConfig,
    max_queued: int,
    sides: Sides,
    draft: Path | None,
    quantisation: Quantisation | None,
    adapters: Mapping[str, Path],
) -> Task:
    """Return the task of the workers of `open_apart`."""
    return Task(
        str(model_dir),
        "",
        config.model_dump(),
        device,
        max_queued=sides.decode * config.max_sequences + max_queued,
        draft=None if draft is None else str(draft),
        quantisation=None if quantisation is None else dataclasses.asdict(quantisation),
        adapters={name: str(folder) for name, folder in adapters.items()},
        threads=sides.threads,
        shared_folder=True,
    )


def _open_engine(
    model_dir: Path,
    device: str,
    config: EngineConfig,
    layout: Layout,
    failure: Failure,
    opened: contextlib.ExitStack,
    draft: Path | None,
    quantisation: Quantisation | None,
    adapters: Mapping[str, Path],
    balancing: Balancing,
) -> Engine:
    place = select_device(device).torch
    small = None if draft is None else load_model(draft, device=place)
    further = config.speculate == "mtp"
    if layout.tp * layout.ep == 1:
        model = load_model(model_dir, device=place, quantisation=quantisation, further=further)
        engine = Engine(model, config, small)
    else:
        ranks = open_ranks(
            model_dir, layout, device, failure, quantisation=quantisation, further=further, balancing=balancing
        )
        leader = opened.enter_context(ranks)
        engine = Engine(leader.model, config, small, leader)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    return engine


def _refuse_sleep(settings: Settings) -> None:
    if settings.sleep_after is not None:
        raise LiaoyuanError("sleep_after is not for --prefill and --decode: leave out these, or that setting.")


def _context_length(room: int, wanted: int | None) -> int:
    if wanted is not None and wanted > room:
        raise LiaoyuanError(f"The context length {wanted} is more than model and cache hold ({room} tokens).")
    return wanted or room


def _load_tokenizer(model_dir: Path) -> Tokenizer:
    if not model_dir.is_dir():
        raise LiaoyuanError(f"The model folder {model_dir} does not exist.")
    tokenizer = Tokenizer.load(model_dir)
    ids, rows = tokenizer.vocab_size, read_config(model_dir).vocab_size
    if not ids <= rows < ids + MOST_PADDING:
        raise LiaoyuanError(
            f"The tokenizer and the model in {model_dir} disagree: the tokenizer has {ids} ids, the model {rows}."
        )
    return tokenizer


def check_port(host: str = "127.0.0.1", port: int = 8000) -> None:
    """Raise LiaoyuanError if a server could not listen there now: better known before long work than after it."""
    bind(host, port).close()


def is_loopback(host: str) -> bool:
    """Return whether an address, or all of several, can be reached from this machine alone."""
    return all(each.strip() in LOOPBACK for each in host.split(","))


def _bind_all(hosts: str, port: int, kept: contextlib.ExitStack) -> list[socket.socket]:
    """Return listening sockets, all of one port."""
    bound: list[socket.socket] = []
    if not all(host.strip() for host in hosts.split(",")):
        raise LiaoyuanError(f"--host '{hosts}' names an empty address: write 127.0.0.1, or several as 127.0.0.1,::1.")
    for host in hosts.split(","):
        bound.append(kept.enter_context(bind(host.strip(), bound[0].getsockname()[1] if bound else port)))
    return bound


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; it takes the port before the model is loaded, which may take long."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(1024)
    except (OSError, OverflowError) as error:
        bound.close()
        raise LiaoyuanError(_why_not(error, host, port)) from error
    return bound


def _why_not(error: Exception, host: str, port: int) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use; choose another with --port, or --port 0 for any free one."
    if isinstance(error, OverflowError):
        return f"The port must be from 0 to 65535 (it is {port})."
    return f"Cannot listen on port {port} of {host}: {error}."
