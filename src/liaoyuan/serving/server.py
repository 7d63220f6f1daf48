"""A server around a model folder: checked at the door, bound to loopback unless told otherwise."""

import asyncio
import contextlib
import dataclasses
import errno
import socket
import threading
from pathlib import Path
from types import TracebackType

import uvicorn
from fastapi import FastAPI

from liaoyuan.checkpoint import load_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.device import select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, EngineThread, read_pooling
from liaoyuan.models import Decoder
from liaoyuan.serving.about import About, read_about
from liaoyuan.serving.app import build_app
from liaoyuan.serving.connections import PatientProtocol
from liaoyuan.serving.security import Access
from liaoyuan.serving.unready import answering_unready

MOST_PADDING = 1024  # rows that a model's embedding may have beyond the tokenizer's ids (padded for speed)
GRACE_SECONDS = 2  # how long open answers may go on after Ctrl-C
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Server:
    """An app on a listening socket, and what else ends with it; `run` serves until Ctrl-C or `stop`."""

    def __init__(self, app: FastAPI, bound: socket.socket, closing: contextlib.ExitStack) -> None:
        self.app = app
        self._socket, self._closing = bound, closing
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

    @property
    def url(self) -> str:
        """Return the address, such as http://127.0.0.1:8000."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until Ctrl-C (which is a clean end) or `stop` from another thread; then close everything."""
        try:
            self._uvicorn.run(sockets=[self._socket])
        except KeyboardInterrupt:
            pass
        finally:
            self.close()

    def stop(self) -> None:
        """Make `run` return soon."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Free the port and end the engine; `run` does it itself."""
        self._closing.close()
        self._socket.close()

    def __enter__(self) -> "Server":
        """Serve in a thread of its own until the block ends."""
        self._thread = threading.Thread(target=self.run, name="server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self._thread.join()


class _Uvicorn(uvicorn.Server):
    """Ends the engine before it waits for open answers, so that they end at once and say why."""

    def __init__(self, config: uvicorn.Config, closing: contextlib.ExitStack) -> None:
        super().__init__(config)
        self._closing = closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
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
) -> Server:
    """Load the model of a Hugging Face folder and return a server that holds the port (0: any free one).

    Args:
        name: what the API calls the model; the folder's name if None.
        call_format: how the model writes tool calls; None: see its chat template.
        control: see `build_app`.
        about: what the chat page says; read from the folder's `liaoyuan.json` if None.
        access: who may ask, and how much; on a loopback address only requests that name it are answered.
        max_queued: requests that may wait beyond those that the engine runs at once.
        context_length: the most tokens of a request; as many as model and cache hold if None.

    Raises:
        LiaoyuanError: the port is in use, the folder is missing or torn, or tokenizer and model disagree.
    """
    with contextlib.ExitStack() as port_kept, contextlib.ExitStack() as opened:
        bound = port_kept.enter_context(_bind(host, port))
        with answering_unready(bound):
            tokenizer, model = _load(model_dir, device)
            running = Engine(model, engine)
            runner = opened.enter_context(EngineThread(running, max_queued))
            app = build_app(
                runner,
                tokenizer,
                name or model_dir.resolve().name,
                _context_length(running.room, context_length),
                about or read_about(model_dir),
                () if model.config.eos_token_id is None else (model.config.eos_token_id,),
                dataclasses.replace(access, loopback_only=host in LOOPBACK),
                read_pooling(model_dir),
                model.config.vocab_size,
                call_format,
                control,
            )
        port_kept.pop_all()
        return Server(app, bound, opened.pop_all())


def _context_length(room: int, wanted: int | None) -> int:
    if wanted is not None and wanted > room:
        raise LiaoyuanError(f"The context length {wanted} is more than model and cache hold ({room} tokens).")
    return wanted or room


def _load(model_dir: Path, device: str) -> tuple[Tokenizer, Decoder]:
    if not model_dir.is_dir():
        raise LiaoyuanError(f"The model folder {model_dir} does not exist.")
    place = select_device(device)
    tokenizer = Tokenizer.load(model_dir)
    model = load_model(model_dir, device=place.torch)
    ids, rows = tokenizer.vocab_size, model.config.vocab_size
    if not ids <= rows < ids + MOST_PADDING:
        raise LiaoyuanError(
            f"The tokenizer and the model in {model_dir} disagree: the tokenizer has {ids} ids, the model {rows}."
        )
    return tokenizer, model


def check_port(host: str = "127.0.0.1", port: int = 8000) -> None:
    """Raise LiaoyuanError if a server could not listen there now: better known before long work than after it."""
    _bind(host, port).close()


def _bind(host: str, port: int) -> socket.socket:
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
