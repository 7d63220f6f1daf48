"""One model in several processes, one engine: what the first process calls, the others call too.

The engine, its scheduler and all sampling live in the first process, the leader. Its model announces each call before
it makes it, and its cache each copy of blocks; the followers make the same calls with the same tensors. A step is one
broadcast of one flat tensor, and a second one if it does not fit into the first (`inference/message.py`).
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from liaoyuan.checkpoint import read_weights
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.message import as_text, receive, send, text_tensor
from liaoyuan.inference.weights import Weights
from liaoyuan.models import AttentionContext, Decoder, PackedContext, read_config
from liaoyuan.ops import checksum
from liaoyuan.parallel import Program, local

Result = TypeVar("Result")


class Call(IntEnum):
    """What the leader announces."""

    END = 0
    CACHE = 1  # an empty cache: [number of blocks, size of a block]
    DROP = 2  # there is no cache any more
    COPY = 3  # blocks of the cache: sources, targets
    PAGED = 4  # a forward pass over the cache
    PACKED = 5  # a forward pass over whole documents
    READ = 6  # new weights, of a folder: its path
    TAKE = 7  # the weights that were read
    SUM = 8  # the checksum of all weights
    SLEEP = 9  # without weights
    WAKE = 10


class Leader:
    """The first process's model, `model`, whose calls the followers make too; a `memory.Memory` of all processes.

    Calls from several threads take turns. If one fails, the processes stand at different places: all later ones are
    refused, and `failure` says why.
    """

    def __init__(self, program: Program, control: ProcessGroup, failed: Callable[[str], None]) -> None:
        """control: a group of all processes on the CPU, which waits as long as the engine has nothing to do.

        failed: is told of a failure.
        """
        (self.model,) = program.models
        self._failed = failed
        self.failure = ""
        self._program, self._control, self._part = program, control, Part(program, control)
        self._turn = threading.RLock()
        self._forward = self.model.forward
        self.model.forward = self._call  # type: ignore[method-assign,assignment]

    def new_cache(self, num_blocks: int, block_size: int) -> KeyValueCache:
        """Return this process's part of a new cache; the others make theirs, and drop it when this one is dropped."""
        with self._turn:
            model = self.model
            self._announce(Call.CACHE, [torch.tensor([num_blocks, block_size])])
            cache = SharedCache(model.config, num_blocks, block_size, self._program.device, model.key_value_heads)
            cache.announce = self._announce_copy
        weakref.finalize(cache, self._drop)
        return cache

    def checked(self, weights: Weights) -> Mapping[str, Tensor]:
        """Return this process's part of new weights for `copy_weights`; the others have read theirs.

        Raises:
            LiaoyuanError: they are no folder, or one of the processes refuses its part.
        """
        if not isinstance(weights, Path):
            raise LiaoyuanError("A model that is spread over several processes takes its weights from a folder.")
        with self._turn:
            self._announce(Call.READ, [text_tensor(str(weights.resolve()))])
            return self._together(lambda: self._part.read(weights))

    def copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._everywhere(Call.TAKE, self._part.take)

    def checksum(self) -> str:
        return self._everywhere(Call.SUM, self._part.checksum)

    def drop_weights(self) -> None:
        self._everywhere(Call.SLEEP, self._part.drop_weights)

    def take_memory(self) -> None:
        self._everywhere(Call.WAKE, self._part.take_memory)

    def close(self) -> None:
        """Let the followers end."""
        with self._turn:
            if not self.failure:
                self._announce(Call.END, [])
                self.failure = "they have ended"

    def _call(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: AttentionContext,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        kind, places = _places(context)
        with self._turn:
            self._announce(kind, [tokens, positions, targets, rows, *places])
            return self._together(lambda: self._forward(tokens, positions, context, targets, rows))

    def _everywhere(self, kind: Call, work: Callable[[], Result]) -> Result:
        with self._turn:
            self._announce(kind, [])
            return self._together(work)

    def _announce_copy(self, source: Tensor, target: Tensor) -> None:
        self._announce(Call.COPY, [source, target])

    def _announce(self, kind: Call, tensors: Sequence[Tensor | None]) -> None:
        with self._turn:
            if self.failure:
                raise LiaoyuanError(f"The processes of this model do not work together any more: {self.failure}.")
            self._together(lambda: send(kind, tensors, self._control))

    def _drop(self) -> None:
        if not self.failure:
            self._announce(Call.DROP, [])

    def _together(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except LiaoyuanError:
            raise  # refused in all processes alike
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._failed(self.failure)
            raise LiaoyuanError(f"A process of this model failed, and the others with it: {self.failure}.") from error


class SharedCache(KeyValueCache):
    """The leader's part of a cache."""

    announce: Callable[[Tensor, Tensor], None]

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.announce(source, target)
        super().copy(source, target)


class Part:
    """This process's part of the weights."""

    def __init__(self, program: Program, control: ProcessGroup) -> None:
        self._program, self._control = program, control
        self._new: dict[str, Tensor] = {}
        self._dropped: dict[torch.UntypedStorage, int] = {}

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """Read this process's part of the weights of a folder beside its own.

        Raises:
            LiaoyuanError: some process cannot read its part, or may not take it.
        """
        fresh = {name: torch.empty_like(tensor.detach()) for name, tensor in self._program.named_tensors()}
        refusal = _refusal(fresh, self._program, folder)
        failed = torch.tensor(int(bool(refusal)))
        dist.all_reduce(failed, group=self._control)
        if failed:
            raise LiaoyuanError(refusal or f"Another process of this model cannot read its part of {folder}.")
        self._new = {name: local(tensor) for name, tensor in fresh.items()}
        return self._new

    @torch.no_grad()
    def take(self) -> None:
        """Copy what was read into the model."""
        for name, tensor in self._own().items():
            tensor.copy_(self._new[name])
        self._new = {}

    def checksum(self) -> str:
        """Return what `weights.weights_checksum` returns of the whole model; all processes must ask."""
        total, named = 0, dict(self._program.named_tensors())
        for _, whole in self._program.whole_tensors({name: named[name] for name in sorted(named)}):
            total = checksum(whole, before=total)
        return f"{total:016x}"

    def drop_weights(self) -> None:
        pieces = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in self._own().values()}
        self._dropped = {piece: piece.nbytes() for piece in pieces.values()}
        for piece in self._dropped:
            piece.resize_(0)

    def take_memory(self) -> None:
        for piece, size in self._dropped.items():
            piece.resize_(size)
        self._dropped = {}

    def _own(self) -> dict[str, Tensor]:
        return {name: local(tensor.detach()) for name, tensor in self._program.named_tensors()}


def follow(program: Program, control: ProcessGroup) -> None:
    """Make the leader's calls until it ends them."""
    (model,) = program.models
    device, part = program.device, Part(program, control)
    silent = {
        Call.TAKE: part.take,
        Call.SUM: part.checksum,
        Call.SLEEP: part.drop_weights,
        Call.WAKE: part.take_memory,
    }
    cache: KeyValueCache | None = None
    while True:
        kind, found = receive(control)
        if kind == Call.END:
            return
        if kind == Call.CACHE:
            assert found[0] is not None
            num_blocks, block_size = found[0].tolist()
            cache = KeyValueCache(model.config, num_blocks, block_size, device, model.key_value_heads)
        elif kind == Call.DROP:
            cache = None
        elif kind == Call.READ:
            assert found[0] is not None
            with contextlib.suppress(LiaoyuanError):  # the leader raises it
                part.read(Path(as_text(found[0])))
        elif kind in silent:
            silent[Call(kind)]()
        else:
            _repeat(Call(kind), model, cache, [x if x is None else x.to(device) for x in found])


@torch.inference_mode()
def _repeat(kind: Call, model: Decoder, cache: KeyValueCache | None, tensors: list[Any]) -> None:
    if kind is Call.PACKED:
        tokens, positions, targets, rows, *places = tensors
        model(tokens, positions, PackedContext(*places), targets, rows)
        return
    assert cache is not None, "the leader has shown no cache"
    if kind is Call.COPY:
        cache.copy(*tensors)
    else:
        tokens, positions, targets, rows, *places = tensors
        model(tokens, positions, PagedContext(cache, *places), targets, rows)


def _places(context: AttentionContext) -> tuple[Call, list[Tensor]]:
    if isinstance(context, PagedContext):
        return Call.PAGED, [context.slots, context.block_tables, context.query_starts, context.lengths]
    if isinstance(context, PackedContext):
        return Call.PACKED, [context.boundaries]
    raise LiaoyuanError(f"A {type(context).__name__} cannot be shared with other processes.")


def _refusal(fresh: dict[str, Tensor], program: Program, folder: Path) -> str:
    """Read new weights; return why they cannot be taken, or nothing."""
    try:
        if read_config(folder) != program.config:
            return f"The config.json of {folder} is that of another model than the one that is served."
        read_weights(fresh, program.config, folder)
    except LiaoyuanError as error:
        return str(error)
    wrong = [name for name, tensor in fresh.items() if not bool(local(tensor).isfinite().all())]
    return f"The new weight '{wrong[0]}' of {folder} has values that are not numbers." if wrong else ""
