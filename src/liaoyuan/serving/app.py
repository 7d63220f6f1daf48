"""The HTTP application: OpenAI-compatible API, chat page, health."""

import datetime
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.staticfiles import StaticFiles

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import Grammars, ThinkMarks
from liaoyuan.serving.about import About
from liaoyuan.serving.chat import chat_routes
from liaoyuan.serving.completions import completion_routes
from liaoyuan.serving.errors import ANTHROPIC_PATH, add_handlers
from liaoyuan.serving.generation import Runner, Served
from liaoyuan.serving.llama_cpp import llama_routes
from liaoyuan.serving.markdown import render
from liaoyuan.serving.messages import message_routes
from liaoyuan.serving.protocol import RenderRequest
from liaoyuan.serving.responses import response_routes
from liaoyuan.serving.scores import PromptScorer
from liaoyuan.serving.security import Guard
from liaoyuan.serving.tools import format_of

PAGE = Path(__file__).parent / "page"


def build_app(
    runner: Runner,
    tokenizer: Tokenizer,
    name: str,
    context_length: int,
    about: About = About(),
    scorer: PromptScorer | None = None,
    stop_token_ids: tuple[int, ...] = (),
    loopback_only: bool = True,
    vocab_size: int | None = None,
    call_format: str | None = None,
) -> FastAPI:
    """Return the app that serves one model.

    Args:
        runner: a started `inference.EngineThread`.
        name: what the API calls the model.
        context_length: the most tokens of a prompt and its answer together.
        about: what the chat page says of the model.
        scorer: log-probabilities of prompts (`echo` with `logprobs`); None refuses them.
        stop_token_ids: tokens that end an answer, besides the tokenizer's own.
        loopback_only: refuse requests whose Host is not this machine's loopback.
        vocab_size: logits of the model, which may be more than the tokenizer has ids; None: just as many.
        call_format: how the model writes tool calls (a name of `tools.FORMATS`); None: found in its chat template.

    Raises:
        LiaoyuanError: there is no such form of tool calls.
    """
    marks = ThinkMarks(*tokenizer.think_ids) if tokenizer.think_ids else None
    stops = tuple(dict.fromkeys((*tokenizer.eos_ids, *stop_token_ids)))
    grammars = Grammars(tokenizer, vocab_size or tokenizer.vocab_size, stops)
    form = format_of(tokenizer.template_text, call_format)
    served = Served(runner, tokenizer, name, context_length, int(time.time()), stops, marks, grammars, scorer, form)
    # The documentation pages of FastAPI load scripts from elsewhere; /openapi.json is the whole truth.
    app = FastAPI(title="Liaoyuan", docs_url=None, redoc_url=None)
    add_handlers(app)
    _add_models(app, served)
    for routes in (chat_routes, completion_routes, message_routes, response_routes, llama_routes):
        router = routes(served)
        app.include_router(router)
        _add_short_paths(app, router)
    _add_page(app, served, about)
    app.add_middleware(Guard, loopback_only=loopback_only)
    return app


def _add_models(app: FastAPI, served: Served) -> None:
    card = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "liaoyuan",
        "max_model_len": served.context_length,
        # What Anthropic's client reads of a model:
        "type": "model",
        "display_name": served.name,
        "created_at": datetime.datetime.fromtimestamp(served.created, datetime.UTC).isoformat(),
    }
    page = {"has_more": False, "first_id": served.name, "last_id": served.name}

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card], **page}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        served.check_model(name)
        return card

    @app.get("/v1/health", include_in_schema=False, response_model=None)
    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        state = served.runner.health()
        return JSONResponse({"status": "ok" if state["alive"] else "failed", **state}, 200 if state["alive"] else 503)


def _add_short_paths(app: FastAPI, router: APIRouter) -> None:
    """Answer OpenAI's paths without "/v1" too, as llama.cpp does: many clients are set up so."""
    for route in router.routes:
        assert isinstance(route, APIRoute)
        short = route.path.removeprefix("/v1")
        if short != route.path and not route.path.startswith(ANTHROPIC_PATH):
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

    app.mount("/page", _Revalidated(directory=PAGE), name="page")


class _Revalidated(StaticFiles):
    """Static files of which a browser asks each time whether they have changed, so that an upgrade shows at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response
