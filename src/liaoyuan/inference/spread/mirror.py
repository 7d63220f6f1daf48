"""One model in several processes, one engine: what the first process calls, the others call too.

The engine, its scheduler and all sampling live in the first process, the leader. Its model announces each call before
it makes it, and its cache each copy of blocks; the followers make the same calls with the same tensors. A step is one
broadcast of one flat tensor, and a second one if it does not fit into the first (`inference/spread/message.py`).
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.adapter_stacks import Stacks
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.spread.adapters import SharedStacks, adapter_bytes, choose_as_told, unpack_adapter
from liaoyuan.inference.spread.balance import Balance
from liaoyuan.inference.spread.further import FollowedStreams, SharedStreams
from liaoyuan.inference.spread.message import Call, as_text, receive, send, text_tensor
from liaoyuan.inference.spread.part import Evidence, Part
from liaoyuan.inference.weights import Weights
from liaoyuan.models import AttentionContext, Decoder, PackedContext
from liaoyuan.ops import LogitStatistics
from liaoyuan.parallel import Layout, PlacedExperts, Program

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
END_SECONDS = 5.0  # within which all hear of the end


class Leader:
    """The first process's model, `model`, whose calls the followers make too; a `memory.Memory` of all processes.

    Calls from several threads take turns. If one fails, the processes stand at different places: all later ones are
    refused, and `failure` says why.

    recordings: of this process, see `record`.
    """

    def __init__(
        self,
        program: Program,
        control: ProcessGroup,
        failed: Callable[[str], None],
        rebalance_seconds: float | None = None,
    ) -> None:
        """control: a group of all processes on the CPU, which waits as long as the engine has nothing to do.

        failed: is told of a failure. rebalance_seconds: between two looks at whether experts should lie elsewhere;
            None: they stay.
        """
        (self.model,) = program.models
        self._failed = failed
        self.failure = ""
        self._program, self._control, self._part = program, control, Part(program, control)
        self._evidence = Evidence(program, control)
        self.recordings = self._evidence.recordings
        self._turn = threading.RLock()
        self._stacks = SharedStacks(program, self)
        self._caches, self._inside = 0, 0  # how many there were; the thread that makes an announced call
        self._unneeded: list[int] = []  # numbers of caches to be dropped
        self._forward = self.model.forward
        self.model.forward = self._call  # type: ignore[method-assign,assignment]
        for part in (self.model.embed_tokens, *self.model.layers):
            part.register_forward_pre_hook(self._refuse_alone)
        read = self.model.read_logits

        def read_together(*inputs: Any, **options: Any) -> LogitStatistics:
            self._refuse_alone()
            return read(*inputs, **options)

        self.model.read_logits = read_together
        self._balance = Balance(program.placed, self.move_experts, rebalance_seconds) if program.placed else None

    @property
    def placed(self) -> PlacedExperts | None:
        """The experts of the model, where they lie in slots."""
        return self._program.placed

    def describe(self) -> str:
        return self.layout.describe()

    def new_cache(self, num_blocks: int, block_size: int) -> KeyValueCache:
        """Return this process's part of a new cache; the others make theirs, and drop it when this one is dropped."""
        with self._turn:
            model, number = self.model, self._caches
            self._announce(Call.CACHE, [torch.tensor([number, num_blocks, block_size])])
            cache = SharedCache(model.config, num_blocks, block_size, self._program.device, model.key_value_heads)
            cache.number, cache.announce = number, self._announce
            self._caches += 1
        weakref.finalize(cache, self._unneeded.append, number)  # when that is, in the middle of a call, is not ours
        return cache

    def adapter_stacks(self) -> SharedStacks:
        """Return where adapters go; all engines of this model have the same."""
        return self._stacks

    def adapter_came(self, places: Tensor, ranks: Tensor, values: Tensor) -> None:
        """See `adapters.pack_adapter`."""
        with self._turn:
            self._announce(Call.ADAPTER, [places, ranks])
            self._together(lambda: dist.broadcast(values, group_src=0, group=self._control))

    def adapter_went(self, number: int) -> None:
        """The others forget it too."""
        self._announce(Call.NO_ADAPTER, [torch.tensor([number])])

    def further_streams(self, slots: int) -> SharedStreams:
        """Return this process's streams of a further layer; the others have theirs."""
        self._announce(Call.STREAMS, [torch.tensor([slots])])
        return SharedStreams(self.model, slots, self.make)

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

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._control.size()

    @property
    def layout(self) -> Layout:
        """How the model lies over them."""
        assert self._program.mesh
        return self._program.mesh.layout

    @property
    def can_learn(self) -> bool:
        """Whether training could take over this model: `learn`."""
        return self._evidence.trained.is_known

    def learn(self, tokens: Tensor, positions: Tensor, targets: Tensor, boundaries: Tensor) -> Tensor:
        """Return what training's forward in this layout gives for whole documents; see `Trained`."""
        with self._turn:
            tensors = [tokens, positions, targets, boundaries]
            self._announce(Call.LEARN, tensors)
            return self._together(lambda: self._evidence.trained(*tensors))

    def end_learning(self) -> None:
        """Give the memory of training's model back."""
        self._everywhere(Call.FORGET, self._evidence.trained.drop)

    def record(self, text: Tensor, learns: bool) -> None:
        """Let each process record what this model, or that of training, gives for a text; see `Recordings`."""
        with self._turn:
            self._announce(Call.RECORD, [torch.tensor([learns]).long(), text])
            self._evidence.record(learns, text)

    def first_differences(self) -> list[int]:
        """Return of each process where the two passes that it has recorded part; see `Recordings.end`."""
        return self._everywhere(Call.DIFFER, self._evidence.first_differences)

    def promised(self) -> set[str]:
        """Return the operators whose kernels promise in every process that a row's bits are its own."""
        return self._everywhere(Call.PROMISE, self._evidence.promised)

    def move_experts(self, placement: np.ndarray) -> int:
        """Bring the experts of all processes to a placement, int [layers, ranks, slots]; return how many were sent.

        Raises:
            LiaoyuanError: it does not fit, or a process cannot take its part: nothing has changed. Or a process failed.
        """
        tensor = torch.from_numpy(placement.astype(np.int32))
        return self._everywhere(Call.MOVE, lambda: self._part.move(tensor), [tensor])

    def before_step(self) -> None:
        if self._balance is None:
            return
        try:
            self._balance.before_step()
        except LiaoyuanError as refusal:
            if self.failure:
                raise
            logger.warning("experts were not moved: %s", refusal)

    def statistics(self) -> dict[str, Any]:
        return {} if self._balance is None else self._balance.statistics()

    def close(self) -> None:
        """Let the followers end."""
        with self._turn:
            if not self.failure:
                self._announce(Call.END, [])
                self.failure = "they have ended"
                _part_from(self._control)

    def _call(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: AttentionContext,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        kind, number, places = _places(context)
        head = torch.tensor([hidden, *number], dtype=torch.int64)
        message = [head, tokens, positions, targets, rows, *self._stacks.chosen, *places]
        return self.make(kind, message, lambda: self._forward(tokens, positions, context, targets, rows, hidden=hidden))

    def make(self, kind: Call, message: Sequence[Tensor | None], work: Callable[[], Result]) -> Result:
        """Announce a call that computes with the model, and make it."""
        with self._turn:
            self._announce(kind, message)
            self._inside = threading.get_ident()
            try:
                return self._together(work)
            finally:
                self._inside = 0

    def _refuse_alone(self, *_: object) -> None:
        """Refuse to compute a part of the model that the others do not compute: all would wait for each other."""
        if self._inside != threading.get_ident():
            raise LiaoyuanError("A model that is spread over several processes can only be called as a whole.")

    def _everywhere(self, kind: Call, work: Callable[[], Result], tensors: Sequence[Tensor] = ()) -> Result:
        with self._turn:
            self._announce(kind, tensors)
            return self._together(work)

    def _announce(self, kind: Call, tensors: Sequence[Tensor | None]) -> None:
        with self._turn:
            if self.failure:
                raise LiaoyuanError(f"The processes of this model do not work together any more: {self.failure}.")
            dropped = [(Call.DROP, [torch.tensor([self._unneeded.pop()])]) for _ in range(len(self._unneeded))]
            for message in (*dropped, (kind, tensors)):
                self._together(partial(send, *message, self._control))

    def _together(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except LiaoyuanError:
            raise  # refused in all processes alike
        except BaseException as error:
            self.failure = "one of them failed"
            self._failed(f"{type(error).__name__}: {error}".partition("\n")[0])
            raise LiaoyuanError(
                "A process of this model failed, and the others with it: start it again; its log says why."
            ) from error


class SharedCache(KeyValueCache):
    """The leader's part of a cache."""

    number: int
    announce: Callable[[Call, Sequence[Tensor]], None]

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.announce(Call.COPY, [torch.tensor([self.number]), source, target])
        super().copy(source, target)


def follow(program: Program, control: ProcessGroup) -> None:
    """Make the leader's calls until it ends them."""
    (model,) = program.models
    device, part, evidence = program.device, Part(program, control), Evidence(program, control)
    silent: dict[Call, Callable[[], object]] = {
        Call.TAKE: part.take,
        Call.SUM: part.checksum,
        Call.SLEEP: part.drop_weights,
        Call.WAKE: part.take_memory,
        Call.FORGET: evidence.trained.drop,
        Call.DIFFER: evidence.first_differences,
        Call.PROMISE: evidence.promised,
    }
    caches, stacks, streams = dict[int, KeyValueCache](), Stacks(model), FollowedStreams(model)
    while True:
        kind, found = receive(control)
        if kind == Call.END:
            _part_from(control)
            return
        head = [] if not found or found[0] is None else found[0].tolist()
        if kind == Call.CACHE:
            number, num_blocks, block_size = head
            caches[number] = KeyValueCache(model.config, num_blocks, block_size, device, model.key_value_heads)
        elif kind == Call.DROP:
            del caches[head[0]]
        elif kind == Call.READ:
            with contextlib.suppress(LiaoyuanError):  # the leader raises it
                part.read(Path(as_text(head)))
        elif kind == Call.MOVE:
            (placement,) = found
            assert placement is not None
            with contextlib.suppress(LiaoyuanError):
                part.move(placement)
        elif kind in silent:
            silent[Call(kind)]()
        elif kind == Call.ADAPTER:
            _take_adapter(stacks, program, control, *found)
        elif kind == Call.NO_ADAPTER:
            stacks.remove(head[0])
        elif kind == Call.COPY:
            caches[head[0]].copy(*(x.to(device) for x in found[1:] if x is not None))
        elif kind == Call.LEARN:
            evidence.trained(*(x.to(device) for x in found if x is not None))
        elif kind == Call.RECORD:
            evidence.record(bool(head[0]), *(x for x in found[1:] if x is not None))
        elif kind >= Call.STREAMS:
            streams.repeat(Call(kind), caches, head, [x.to(device) for x in found if x is not None])
        else:
            _repeat(Call(kind), model, caches, stacks, head, found[1:])


def _take_adapter(stacks: Stacks, program: Program, control: ProcessGroup, *message: Tensor | None) -> None:
    places, ranks = (tensor for tensor in message if tensor is not None)
    values = torch.empty(adapter_bytes(places, ranks, program), dtype=torch.uint8)
    dist.broadcast(values, group_src=0, group=control)
    stacks.take(*unpack_adapter(places, ranks, values, program))


@torch.inference_mode()
def _repeat(
    kind: Call,
    model: Decoder,
    caches: dict[int, KeyValueCache],
    stacks: Stacks,
    head: list[int],
    found: list[Tensor | None],
) -> None:
    """Make the leader's call of the model."""
    device = model.embed_tokens.weight.device
    inputs: list[Any] = [x if x is None else x.to(device) for x in found]
    tokens, positions, targets, rows, _, _, *places = inputs
    context = PagedContext(caches[head[1]], *places) if kind is Call.PAGED else PackedContext(*places)
    choose_as_told(stacks, *found[4:6])
    model(tokens, positions, context, targets, rows, hidden=bool(head[0]))


def _part_from(control: ProcessGroup) -> None:
    """Wait a moment until all know that it ends: who goes before breaks the connection of one that still reads."""
    with contextlib.suppress(RuntimeError):  # then some of them are gone already, or busy
        dist.monitored_barrier(control, timeout=timedelta(seconds=END_SECONDS))


def _places(context: AttentionContext) -> tuple[Call, list[int], list[Tensor]]:
    if isinstance(context, PagedContext) and isinstance(context.cache, SharedCache):
        places = [context.slots, context.block_tables, context.query_starts, context.lengths]
        return Call.PAGED, [context.cache.number], places
    if isinstance(context, PackedContext):
        return Call.PACKED, [], [context.boundaries]
    raise LiaoyuanError("A model that is spread over several processes needs a cache that all of them know.")
