"""The state of the engine over HTTP, for whoever trains and serves one model: pause, sleep, new weights, their version.

Off unless the server is started with `--control`: who may call these may stop the server and read any model folder.
"""

from typing import Any, Literal

from fastapi import APIRouter

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.operations import Checksum, ForgetPrefixes, Pause, Resume, Sleep, State, UpdateWeights, Wake
from liaoyuan.inference.runner import Operation, Unavailable
from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.generation import Served
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

    @router.post("/pause")
    async def pause(body: PauseRequest = PauseRequest()) -> dict[str, Any]:
        return await _changed(served, Pause(body.mode))

    @router.post("/resume")
    async def resume() -> dict[str, Any]:
        return await _changed(served, Resume())

    @router.post("/sleep")
    async def sleep(body: SleepRequest = SleepRequest()) -> dict[str, Any]:
        return await _changed(served, Sleep(without_weights=body.level == 2))

    @router.post("/wake_up")
    async def wake_up() -> dict[str, Any]:
        """Take the memory again; who has weights goes on at once, who has none waits for an update and `/resume`."""
        return await _changed(served, Wake())

    @router.post("/update_weights")
    async def update_weights(body: UpdateRequest) -> dict[str, Any]:
        return await _changed(served, UpdateWeights(body.folder, body.version))

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, Any]:
        return await _changed(served, ForgetPrefixes())

    @router.get("/state")
    async def state() -> dict[str, Any]:
        return await _state(served)

    @router.get("/weights")
    async def weights() -> Any:
        return await _done(served, Checksum())

    return router


async def _changed(served: Served, change: Operation) -> dict[str, Any]:
    await _done(served, change)
    return await _state(served)


async def _state(served: Served) -> dict[str, Any]:
    said = await _done(served, State())
    return {"state": said["state"], "version": said["version"]}


async def _done(served: Served, operation: Operation) -> Any:
    """Do something; what is refused is a conflict with the present state (409)."""
    try:
        return await served.runner.do(operation)
    except Unavailable as error:
        raise ApiError(503, str(error), code="worker_failed") from error
    except LiaoyuanError as error:
        raise ApiError(409, str(error), code="state_conflict") from error
