"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.operations import LoadAdapter, UnloadAdapter
from liaoyuan.inference.runner import Unavailable
from liaoyuan.serving.adapters import Shelf
from liaoyuan.serving.errors import ApiError, invalid
from liaoyuan.serving.generation import Runner
from liaoyuan.serving.protocol import Body, Text

PLAIN: dict[int | str, dict[str, Any]] = {
    200: {"description": "Done", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
Name = Annotated[Text, Field(min_length=1, max_length=200)]


class LoadRequest(Body):
    """Body of `/v1/load_lora_adapter`. load_inplace: take the place of one of this name."""

    lora_name: Name
    lora_path: Annotated[Text, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadRequest(Body):
    """Body of `/v1/unload_lora_adapter`. lora_int_id: accepted, without effect."""

    lora_name: Name
    lora_int_id: int | None = None


def adapter_routes(runner: Runner, model: str, shelf: Shelf) -> APIRouter:
    """Return the router of these endpoints; `model`: the name that no adapter may have."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter", response_model=None, responses=PLAIN)
    async def load(body: LoadRequest) -> PlainTextResponse:
        name, folder = body.lora_name, _inside(shelf.folder, body.lora_path)
        if name == model:
            raise invalid(f"'{name}' is the model itself; give the adapter another name.", "lora_name")
        with _refusals("lora_path"):
            await runner.do(LoadAdapter(name, str(folder), body.load_inplace))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_model=None, responses=PLAIN)
    async def unload(body: UnloadRequest) -> PlainTextResponse:
        name = body.lora_name
        _folder(shelf.folder)
        if name not in [adapter.name for adapter in shelf.loaded()]:
            raise ApiError(404, f"There is no adapter '{name}'.", "lora_name", "adapter_not_found")
        with _refusals("lora_name"):
            await runner.do(UnloadAdapter(name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


def _folder(root: Path | None) -> Path:
    if root is None:
        raise ApiError(403, "Clients may not change this server's adapters: it was started without --lora-folder.")
    return root.resolve()


def _inside(root: Path | None, path: str) -> Path:
    """Return the folder that a client named, which must lie inside `root`; raises ApiError (403) if it does not."""
    allowed = _folder(root)
    try:
        folder = (allowed / path).resolve()
    except (OSError, ValueError):  # a null byte, a loop of links
        raise invalid("'lora_path' is no path.", "lora_path") from None
    if not folder.is_relative_to(allowed):
        raise ApiError(403, "Adapters are loaded from inside the folder of --lora-folder only.", "lora_path")
    return folder


@contextmanager
def _refusals(param: str) -> Iterator[None]:
    """Turn what the engine refuses into the error of a bad request."""
    try:
        yield
    except Unavailable as error:
        raise ApiError(503, str(error), code="worker_failed") from error
    except LiaoyuanError as error:
        raise invalid(str(error), param) from error
