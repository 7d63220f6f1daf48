"""The HTTP application: OpenAI-compatible API, chat page, health, metrics, and the guard around them."""

import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import Grammars, Pooling, ThinkMarks
from liaoyuan.serving.about import About
from liaoyuan.serving.adapter_routes import adapter_routes
from liaoyuan.serving.adapters import Shelf
from liaoyuan.serving.call_format import taught_format
from liaoyuan.serving.chat import chat_routes
from liaoyuan.serving.completions import completion_routes
from liaoyuan.serving.control import control_routes
from liaoyuan.serving.embeddings import embedding_routes
from liaoyuan.serving.errors import ANTHROPIC_ERRORS, ANTHROPIC_PATH, ERRORS, add_handlers
from liaoyuan.serving.generate import generate_routes
from liaoyuan.serving.generation import Runner, Served
from liaoyuan.serving.llama_cpp import llama_routes
from liaoyuan.serving.markdown import render
from liaoyuan.serving.messages import message_routes
from liaoyuan.serving.metrics import Metrics
from liaoyuan.serving.platforms import platform_routes
from liaoyuan.serving.protocol import Body, Text
from liaoyuan.serving.responses import response_routes
from liaoyuan.serving.security import Access, Guard, origins_pattern
from liaoyuan.serving.settings import Settings
from liaoyuan.serving.slots import slot_routes
from liaoyuan.serving.status import VERSION, status_routes
from liaoyuan.serving.tokens import token_routes
from liaoyuan.serving.tools import named_format

PAGE = Path(__file__).parent / "page"


class RenderRequest(Body):
    """Body of `/page/render`."""

    text: Annotated[Text, Field(max_length=200_000)]


def build_app(
    runner: Runner,
    tokenizer: Tokenizer,
    name: str,
    context_length: int,
    about: About = About(),
    stop_token_ids: tuple[int, ...] = (),
    access: Access = Access(),
    pooling: Pooling = Pooling(),
    vocab_size: int | None = None,
    call_format: str | None = None,
    control: bool = False,
    shelf: Shelf = Shelf(),
    thinking: bool = True,
    settings: Settings = Settings(),
) -> FastAPI:
    """Return the app that serves one model.

    Args:
        runner: a started `inference.EngineThread`.
        name: what the API calls the model.
        context_length: the most tokens of a prompt and its answer together.
        about: what the chat page says of the model.
        stop_token_ids: tokens that end an answer, besides the tokenizer's own.
        access: who may ask, and how much.
        pooling: how the model's hidden states become an embedding.
        vocab_size: logits of the model, which may be more than the tokenizer has ids; None: just as many.
        call_format: how the model writes tool calls (a name of `tools.FORMATS`); None: found in its chat template.
        control: whether who may ask may also pause the engine and change its weights.
        shelf: the adapters that requests may name.
        thinking: whether the model thinks before it answers a request that does not say.
        settings: what else it does where requests leave it open.

    Raises:
        LiaoyuanError: there is no such form of tool calls.
    """
    marks = ThinkMarks(*tokenizer.think_ids) if tokenizer.think_ids else None
    stops = tuple(dict.fromkeys((*tokenizer.eos_ids, *stop_token_ids)))
    grammars = Grammars(tokenizer, vocab_size or tokenizer.vocab_size, stops)
    form = named_format(call_format) if call_format else taught_format(tokenizer)
    metrics = Metrics(runner.health)
    created = int(time.time())
    served = Served(
        runner,
        tokenizer,
        name,
        context_length,
        created,
        stops,
        marks,
        grammars,
        form,
        metrics,
        shelf,
        thinking,
        settings,
    )
    # The documentation pages of FastAPI load scripts from elsewhere; /openapi.json is the whole truth.
    app = FastAPI(title="Liaoyuan", version=VERSION, docs_url=None, redoc_url=None, responses=ERRORS)
    add_handlers(app)
    _add_api(app, served, pooling)
    _include(app, metrics, platform_routes())
    _include(app, metrics, adapter_routes(runner, name, shelf))
    if control:
        _include(app, metrics, control_routes(served))
    if settings.page:
        _add_page(app, served, about)
    wanted = {"wanted": runner.rouse} if settings.sleep_after else {}
    app.add_middleware(Guard, access=access, metrics=metrics, **wanted)
    if access.origins:  # around the guard: a browser must be able to read why it was refused
        app.add_middleware(
            _Pages,
            allow_origin_regex=origins_pattern(access.origins),
            allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
        )
    return app


class _Pages(CORSMiddleware):
    """CORS in which a page that may not ask has made no mistake: the browser finds no leave, and says so itself."""

    def preflight_response(self, request_headers: Headers) -> Response:
        reply = super().preflight_response(request_headers)
        if not self.is_allowed_origin(request_headers["origin"]):
            reply.status_code = 200
        return reply


def _add_api(app: FastAPI, served: Served, pooling: Pooling) -> None:
    _include(app, served.metrics, message_routes(served), responses=ANTHROPIC_ERRORS)
    for routes in (status_routes, slot_routes, token_routes, generate_routes):
        _include(app, served.metrics, routes(served))
    for router in (
        chat_routes(served),
        completion_routes(served),
        response_routes(served),
        llama_routes(served),
        embedding_routes(served, pooling),
    ):
        _include(app, served.metrics, router)
        _add_short_paths(app, router)


def _include(app: FastAPI, metrics: Metrics, router: APIRouter, **options: Any) -> None:
    """Add the routes of a router, of which those of one path each are counted apart (to ask the whole schema for them
    would take a second of every start).
    """
    app.include_router(router, **options)
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    metrics.endpoints.update(route.path for route in routes if route.include_in_schema and "{" not in route.path)


def _add_short_paths(app: FastAPI, router: APIRouter) -> None:
    """Answer OpenAI's paths without "/v1" too, as llama.cpp does (where "/completions" is its own)."""
    paths = {"/completions", *(route.path for route in router.routes if isinstance(route, APIRoute))}
    for route in router.routes:
        assert isinstance(route, APIRoute)
        short = route.path.removeprefix("/v1")
        if short not in paths and not route.path.startswith(ANTHROPIC_PATH):
            app.add_api_route(
                short, route.endpoint, methods=[*(route.methods or ())], response_model=None, include_in_schema=False
            )


def _add_page(app: FastAPI, served: Served, about: About) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/page/about", include_in_schema=False)
    async def about_model() -> dict[str, Any]:
        return {
            "model": served.name,
            "context_length": served.context_length,
            "chat": served.tokenizer.has_template,
            "thinks": served.marks is not None,
            **about.model_dump(),
        }

    @app.post("/page/render", include_in_schema=False)
    def render_markdown(body: RenderRequest) -> dict[str, str]:
        return {"html": render(body.text)}

    app.mount("/page", Revalidated(directory=PAGE), name="page")


class Revalidated(StaticFiles):
    """Static files of which a browser asks each time whether they have changed, so that an upgrade shows at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response
