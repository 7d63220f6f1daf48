"""The console's application: its static page, and small JSON endpoints that read run folders a part at a time."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, Response

from liaoyuan.runs import Absent, Filter, Folder
from liaoyuan.serving.app import PAGE as CHAT
from liaoyuan.serving.app import Revalidated
from liaoyuan.serving.console.reading import Reading
from liaoyuan.serving.errors import ApiError, add_handlers
from liaoyuan.serving.metrics import Metrics
from liaoyuan.serving.security import Access, Guard
from liaoyuan.serving.server import Server, bind
from liaoyuan.serving.status import VERSION

PAGE = Path(__file__).parent / "page"
HOST = "127.0.0.1"  # rollouts are nobody else's business; from afar: ssh -L
MOST_COMPARED = 24
Axis = Literal["step", "tokens", "cpu_seconds", "seconds"]
Name = Annotated[str, Query(max_length=1000)]
Number = Annotated[int, Query(ge=0, le=10**12)]


def open_console(root: Path, port: int = 8100) -> Server:
    """Return a server that shows the runs in `root` and holds the port (0: any free one).

    Raises:
        LiaoyuanError: the port is in use, or there is no such folder.
    """
    folder = Folder(root)
    folder.entries()
    return Server(build_console(folder), bind(HOST, port), contextlib.ExitStack())


def build_console(folder: Folder) -> FastAPI:
    """Return the app that shows the runs in `folder`; it reads there and nowhere else, and writes nothing."""
    app = FastAPI(title="Liaoyuan console", version=VERSION, docs_url=None, redoc_url=None, openapi_url=None)
    add_handlers(app)
    app.add_exception_handler(Absent, _absent)
    _add_data(app, Reading(folder))

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", Revalidated(directory=PAGE))
    app.mount("/chat", Revalidated(directory=CHAT))  # what both pages share
    app.add_middleware(Guard, access=Access(), metrics=Metrics(lambda: {"alive": True}))
    return app


async def _absent(request: Request, error: Exception) -> Response:
    return ApiError(404, str(error), code="absent").response(request.url.path)


def _add_data(app: FastAPI, reading: Reading) -> None:
    @app.get("/data/runs")
    def runs() -> Response:
        return _json(reading.runs())

    @app.get("/data/run")
    def run(run: Name) -> Response:
        return _json(reading.details(run))

    @app.get("/data/curves")
    def curves(
        run: Annotated[list[str], Query(max_length=MOST_COMPARED)],
        figure: Annotated[list[str], Query(max_length=200)],
        axis: Axis = "step",
        most: Annotated[int, Query(ge=10, le=5000)] = 1200,
    ) -> Response:
        return _json(reading.curves(run, figure, axis, most))

    _add_rollouts(app, reading)


def _add_rollouts(app: FastAPI, reading: Reading) -> None:
    @app.get("/data/steps")
    def steps(run: Name) -> Response:
        return _json({"steps": reading.steps(run)})

    @app.get("/data/rollouts")
    def rollouts(
        run: Name,
        step: Number,
        verdict: Name = "",
        level: int | None = None,
        task: Name = "",
        flaw: Name = "",
        words: Name = "",
        offset: Number = 0,
        limit: Annotated[int, Query(ge=1, le=64)] = 8,
        group: int | None = None,
    ) -> Response:
        wanted = Filter(verdict, level, task, flaw, words)
        return _json(reading.rollouts(run, step, wanted, offset, limit, group))

    @app.get("/data/text")
    def text(run: Name, step: Number, place: Number, name: Name, offset: Number = 0) -> Response:
        return _json(reading.text(run, step, place, name, offset))

    @app.get("/data/search")
    def search(
        run: Name,
        verdict: Name = "",
        level: int | None = None,
        task: Name = "",
        flaw: Name = "",
        words: Name = "",
        begin: Number = 0,
    ) -> Response:
        return _json(reading.search(run, Filter(verdict, level, task, flaw, words), begin))


def _json(value: dict[str, Any] | Sequence[Any]) -> Response:
    return Response(json.dumps(value), media_type="application/json", headers={"Cache-Control": "no-store"})
