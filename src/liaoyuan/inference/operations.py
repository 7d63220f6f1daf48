"""What a server asks of an engine besides answers: by name, so that the engine may as well run in another process.

An operation holds JSON's types and returns them. Those that change the engine say what they decide of it, so that
whoever has several engines can bring one that starts later into the state of the others.
"""

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.adapters import Loaded
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.pooling import Pooling, embedding_steps
from liaoyuan.inference.runner import EngineThread, Operation
from liaoyuan.inference.scoring import most_scored, prompt_logprobs


@dataclass(frozen=True)
class Pause:
    """Stop computing; see `Engine.pause`."""

    mode: Literal["abort", "wait", "keep"] = "keep"
    decides: ClassVar[str] = "running"
    lasts: ClassVar[bool] = True

    async def run(self, runner: EngineThread) -> None:
        await runner.pause(self.mode)


@dataclass(frozen=True)
class Resume:
    """Go on after a pause."""

    decides: ClassVar[str] = "running"
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> None:
        await runner.call(Engine.resume)


@dataclass(frozen=True)
class Sleep:
    """Give memory back; see `Engine.sleep`."""

    without_weights: bool = False
    decides: ClassVar[str] = "awake"
    lasts: ClassVar[bool] = True

    async def run(self, runner: EngineThread) -> None:
        await runner.call(lambda engine: engine.sleep(self.without_weights))


@dataclass(frozen=True)
class Wake:
    """Take the memory again; who has weights goes on at once, who has none waits for an update and `Resume`."""

    decides: ClassVar[str] = "awake"
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> None:
        await runner.call(_wake)


@dataclass(frozen=True)
class UpdateWeights:
    """Take the weights of a Hugging Face folder; returns their version."""

    folder: str
    version: int | None = None
    decides: ClassVar[str] = "weights"
    lasts: ClassVar[bool] = True

    async def run(self, runner: EngineThread) -> int:
        return await runner.call(lambda engine: engine.update_weights(Path(self.folder), self.version))


@dataclass(frozen=True)
class ForgetPrefixes:
    """Forget all that was computed for requests that have ended."""

    decides: ClassVar[str] = "prefixes"
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> None:
        await runner.call(Engine.forget_prefixes)


@dataclass(frozen=True)
class LoadAdapter:
    """Load a low-rank adapter; returns all that are loaded then. in_place: take the place of one of this name."""

    name: str
    folder: str
    in_place: bool = False
    decides: ClassVar[str] = "adapter"
    lasts: ClassVar[bool] = True

    async def run(self, runner: EngineThread) -> list[dict[str, Any]]:
        if not self.in_place:
            await runner.call(lambda engine: engine.adapters.check_name(self.name))
        adapters = await runner.call(lambda engine: engine.adapters)
        weights = await asyncio.to_thread(adapters.read, Path(self.folder))  # other requests go on meanwhile

        def put(engine: Engine) -> list[dict[str, Any]]:
            if self.in_place and self.name in [adapter.name for adapter in engine.adapters.loaded()]:
                engine.unload_adapter(self.name)
            engine.adapters.add(self.name, Path(self.folder), weights)
            return _loaded(engine)

        return await runner.call(put)


@dataclass(frozen=True)
class UnloadAdapter:
    """Forget an adapter; returns those that are still loaded."""

    name: str
    decides: ClassVar[str] = "adapter"
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> list[dict[str, Any]]:
        def unload(engine: Engine) -> list[dict[str, Any]]:
            engine.unload_adapter(self.name)
            return _loaded(engine)

        return await runner.call(unload)


@dataclass(frozen=True)
class State:
    """Ask how the engine is: its state, the version of its weights, its sizes, and what is loaded."""

    decides: ClassVar[str] = ""
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> dict[str, Any]:
        return await runner.call(
            lambda engine: {
                "state": engine.state,
                "version": engine.version,
                "room": engine.room,
                "max_sequences": engine.config.max_sequences,
                "adapters": _loaded(engine),
            }
        )


@dataclass(frozen=True)
class Checksum:
    """Ask for version and checksum of the weights."""

    decides: ClassVar[str] = ""
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> dict[str, Any]:
        return await runner.call(lambda engine: {"version": engine.version, "checksum": engine.checksum()})


@dataclass(frozen=True)
class Score:
    """Ask for the log-probabilities of a prompt's tokens after the first, each with its `top` rivals.

    Returns None if the prompt does not fit into one step: then a request with `prompt_logprobs` is the way.
    """

    prompt: list[int]
    top: int
    adapter: str = ""
    decides: ClassVar[str] = ""
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> dict[str, Any] | None:
        def score(engine: Engine) -> dict[str, Any] | None:
            need_ready(engine)
            if len(self.prompt) > most_scored(engine):
                return None
            return asdict(prompt_logprobs(engine, self.adapter, self.prompt, self.top))

        return await runner.call(score)


@dataclass(frozen=True)
class Embed:
    """Ask for the embedding of each text of token ids, a list of numbers each (or of each token); see `Pooling`."""

    texts: list[list[int]]
    mode: Literal["mean", "last", "none"] = "mean"
    decides: ClassVar[str] = ""
    lasts: ClassVar[bool] = False

    async def run(self, runner: EngineThread) -> list[list[Any]]:
        found: dict[int, list[Any]] = {}
        most = await runner.call(lambda engine: engine.config.max_batch_tokens)
        for step in embedding_steps(self.texts, Pooling(self.mode), most):

            def embed(engine: Engine, step=step) -> list[tuple[int, list[Any]]]:  # type: ignore[no-untyped-def]
                need_ready(engine)
                return [(number, row.tolist()) for number, row in step(engine.model, engine.memory)]

            found.update(await runner.call(embed))
        return [found[number] for number in range(len(self.texts))]


OPERATIONS: dict[str, type[Operation]] = {
    kind.__name__: kind
    for kind in (
        Pause, Resume, Sleep, Wake, UpdateWeights, ForgetPrefixes, LoadAdapter, UnloadAdapter, State, Checksum, Score,
        Embed,
    )
}  # fmt: skip


def operation_to_json(operation: Operation) -> dict[str, Any]:
    """Return an operation as JSON's types."""
    return {"operation": type(operation).__name__, "values": asdict(operation)}  # type: ignore[call-overload]


def operation_from_json(words: dict[str, Any]) -> Operation:
    """Undo `operation_to_json`; LiaoyuanError if the words are no operation."""
    try:
        return OPERATIONS[words["operation"]](**words["values"])
    except (KeyError, TypeError) as error:
        raise LiaoyuanError(f"This is nothing that an engine does: {error}.") from error


def need_ready(engine: Engine) -> None:
    """Raise LiaoyuanError if the engine does not compute now: its weights may be gone."""
    if engine.state != "ready":
        raise LiaoyuanError(f"The engine is {engine.state}.")


def adapters_from_json(words: list[dict[str, Any]]) -> list[Loaded]:
    """Return what is loaded, as operations on adapters and `State` tell it."""
    return [Loaded(number=0, **each) for each in words]


def _loaded(engine: Engine) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "digest": one.digest, "folder": one.folder, "rank": one.rank}
        for one in engine.adapters.loaded()
    ]


def _wake(engine: Engine) -> None:
    engine.wake()
    if engine.has_weights:
        engine.resume()
