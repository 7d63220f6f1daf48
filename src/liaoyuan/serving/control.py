"""The state of the engine over HTTP, for whoever trains and serves one model: pause, sleep, new weights, their version.

Off unless the server is started with `--control`: who may call these may stop the server and read any model folder.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import Result, Served
from liaoyuan.serving.protocol import Body


class PauseRequest(Body):
    """Body of `/pause`; see `Engine.pause`."""

    mode: Literal["abort", "wait", "keep"] = "keep"


class SleepRequest(Body):
    """Body of `/sleep`. level 1 gives the cache's memory back, 2 the weights' too."""

    level: Literal[1, 2] = 1


class UpdateRequest(Body):
    """Body of `/update_weights`. folder: a Hugging Face folder of the same model on the server's machine."""

    folder: str
    version: int | None = None


def control_routes(served: Served) -> APIRouter:
    """Return the router of these endpoints; each says the state after it."""
    router = APIRouter()
    runner = served.runner

    @router.post("/pause")
    async def pause(body: PauseRequest = PauseRequest()) -> dict[str, Any]:
        await _done(runner.pause(body.mode))
        return await _state(served)

    @router.post("/resume")
    async def resume() -> dict[str, Any]:
        await _changed(served, Engine.resume)
        return await _state(served)

    @router.post("/sleep")
    async def sleep(body: SleepRequest = SleepRequest()) -> dict[str, Any]:
        await _changed(served, lambda engine: engine.sleep(without_weights=body.level == 2))
        return await _state(served)

    @router.post("/wake_up")
    async def wake_up() -> dict[str, Any]:
        """Take the memory again; who has weights goes on at once, who has none waits for an update and `/resume`."""
        await _changed(served, _wake)
        return await _state(served)

    @router.post("/update_weights")
    async def update_weights(body: UpdateRequest) -> dict[str, Any]:
        await _changed(served, lambda engine: engine.update_weights(Path(body.folder), body.version))
        return await _state(served)

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, Any]:
        await _changed(served, Engine.forget_prefixes)
        return await _state(served)

    @router.get("/state")
    async def state() -> dict[str, Any]:
        return await _state(served)

    @router.get("/weights")
    async def weights() -> dict[str, Any]:
        version, checksum = await _changed(served, lambda engine: (engine.version, engine.checksum()))
        return {"version": version, "checksum": checksum}

    return router


def _wake(engine: Engine) -> None:
    engine.wake()
    if engine.has_weights:
        engine.resume()


async def _state(served: Served) -> dict[str, Any]:
    state, version = await _changed(served, lambda engine: (engine.state, engine.version))
    return {"state": state, "version": version}


async def _changed(served: Served, change: Callable[[Engine], Result]) -> Result:
    return await _done(served.runner.call(change))


async def _done(change: Awaitable[Result]) -> Result:
    """Await a change of state; one that is refused is a conflict with the present state (409)."""
    try:
        return await change
    except LiaoyuanError as error:
        raise ApiError(409, str(error), code="state_conflict") from error
