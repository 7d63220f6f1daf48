"""What a server says of itself: its models, health and readiness, version and metrics."""

import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from liaoyuan.serving.adapters import adapter_cards
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import Served

try:
    VERSION = version("liaoyuan")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0"
SYSTEM_FINGERPRINT = f"build-{VERSION}"  # what OpenAI names the software behind an answer
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def status_routes(served: Served) -> APIRouter:
    """Return the router of these endpoints."""
    router = APIRouter()
    _add_models(router, served)
    _add_health(router, served)

    @router.get("/version")
    async def say_version() -> dict[str, str]:
        return {"version": VERSION}

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Say how many answers somebody waits for, in vLLM's shape; `/metrics` says more."""
        return {"server_load": served.runner.health().get("open", 0)}

    @router.get("/metrics", response_class=Response, responses=METRICS)
    async def metrics(http: HttpRequest) -> Response:
        served.need("metrics")
        text, media_type = served.metrics.text(http.headers.get("accept", ""))
        started = {"Process-Start-Time-Unix": str(int(served.metrics.started))}
        return Response(text, media_type=None, headers={"Content-Type": media_type, **started})

    return router


def _add_models(router: APIRouter, served: Served) -> None:
    card = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "liaoyuan",
        "root": served.name,
        "parent": None,
        "aliases": [served.name, *served.settings.aliases],
        "tags": list(served.settings.tags),
        "max_model_len": served.context_length,
        # What Anthropic's client reads of a model:
        "type": "model",
        "display_name": served.name,
        "created_at": datetime.datetime.fromtimestamp(served.created, datetime.UTC).isoformat(),
    }
    page = {"has_more": False, "first_id": served.name, "last_id": served.name}

    @router.get("/models", include_in_schema=False)
    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        cards = [card, *adapter_cards(card, served.shelf)]
        return {"object": "list", "data": cards, **page, "last_id": cards[-1]["id"]}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        cards = {each["id"]: each for each in (*adapter_cards(card, served.shelf), card)}
        if name not in cards:
            served.choose_model(name)
            return card
        return cards[name]


def _add_health(router: APIRouter, served: Served) -> None:
    """Add the two questions of whoever watches: must it be started anew (health), and does it answer now (ready)?"""

    @router.get("/v1/health", include_in_schema=False, response_model=None)
    @router.get("/health", response_model=None)
    async def health() -> JSONResponse:
        state = served.runner.health()
        return JSONResponse({"status": "ok" if state["alive"] else "failed", **state}, 200 if state["alive"] else 503)

    @router.get("/ping")
    async def ping() -> dict[str, str]:
        if not served.runner.health()["alive"]:
            raise ApiError(503, "The engine does not run.", code="engine_failed")
        return {}

    @router.get("/ready")
    @router.get("/health/ready")
    async def ready() -> dict[str, str]:
        health = served.runner.health()
        if not health["alive"]:
            raise ApiError(503, "The engine does not run.", code="engine_failed")
        if health.get("state", "ready") != "ready" and not health.get("dozing"):
            raise ApiError(503, f"The engine is {health['state']}.", code="not_ready")
        return {"status": "ready"}
