"""What every operator gives for the tokens of one text, in two passes, and where the two part.

Of a model over several processes each records what it computes itself.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.models import Decoder
from liaoyuan.ops.choice import AUTO, compute_with, operators_called
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.watch import Call, Watch, tensors_in

SAME = {"paged_attention": "attention"}  # operators that compute the same, each in its own way
ALONE = ("permute_rows", "write_cache")  # they only move rows
EXPERTS = ".experts"  # what modules are called that get rows sorted by expert
NOWHERE = 2**31 - 1

Key = tuple[str, str, int]  # module, operator, how many times it came before in this forward pass


class Recordings:
    """Two passes of a text in this process, one after the other; `place` of `parts` processes."""

    def __init__(self, place: int = 0, parts: int = 1) -> None:
        self._place, self._parts = place, parts
        self._passes: list[Recorder] = []
        self._running = contextlib.ExitStack()

    def begin(self, model: Decoder, text: Tensor, spread: bool) -> None:
        """Record what `model` computes from now on; see `Recorder`."""
        self._running.close()
        recorder = Recorder(model, text, self._place, self._parts, spread)
        self._passes.append(recorder)
        self._running.enter_context(recorder.recording())

    def end(self) -> int:
        """Return the number of the first operator, in the order of the first pass, that gives a token other bits in the
        second, or NOWHERE. `operators` has the names.
        """
        self._running.close()
        (ours, theirs), self._passes = self._passes, []
        self.operators = [f"{operator} of {module or 'the model'}" for module, operator, _ in ours.found]
        self.last: set[int] = set()  # positions at which both passes have the last operator's rows
        for number, (key, rows) in enumerate(ours.found.items()):
            other = theirs.found.get(key, {})
            self.last = rows.keys() & other.keys()
            if any(not _same(rows[position], other[position]) for position in self.last):
                return number
        return NOWHERE


class Recorder:
    """Keeps what every operator gives for the tokens of one text, whatever batch they are in.

    A row of a batch is the text's if it has its token at its position.
    """

    def __init__(self, model: Decoder, text: Tensor, place: int = 0, parts: int = 1, spread: bool = False) -> None:
        """text: int64 [L], -1 where another text has the same token. place, parts: this process, of those of the model.

        spread: between the layers each process has a part of the tokens, and experts get those of all.
        """
        self._model, self._text = model, text
        self._place, self._parts, self._spread = place, parts, spread
        self.found: dict[Key, dict[int, list[Tensor]]] = {}
        self._places: list[tuple[Tensor, Tensor]] = []  # the text's rows and positions: of all, of those asked for, own
        self._sizes: list[int] = []
        self._order = self._counts = torch.empty(0, dtype=torch.long)
        self._came: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the block runs."""
        hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end, always_call=True),
        ]
        try:
            with operators_called(), Watch(self._model, self._around):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens, positions = (x.cpu() for x in inputs[:2])
        count = len(tokens)
        here = (positions < len(self._text)) & (self._text[positions.clamp_max(len(self._text) - 1)] == tokens)
        asked = inputs[4] if len(inputs) > 4 else named.get("rows")
        chosen = torch.arange(count) if asked is None else asked.cpu()
        kept = [torch.arange(count), chosen]
        if self._spread:
            kept.append(torch.arange(count).unflatten(0, (self._parts, -1))[self._place])
        self._places = [_places(here[rows], positions[rows]) for rows in kept]
        self._sizes = [len(rows) for rows in kept]
        self._came.clear()

    def _end(self, module: Any, inputs: Any, output: Any) -> None:
        self._sizes = []

    def _around(self, call: Call, compute: Callable[[], Any]) -> Any:
        output = computed(call, compute)
        if call.operator == "permute_rows":
            _, self._order, self._counts = output
        if self._sizes and call.operator in OPERATORS and call.operator not in ALONE:
            self._keep(call, list(tensors_in(output)))
        return output

    def _keep(self, call: Call, outputs: list[Tensor]) -> None:
        name, of_experts = SAME.get(call.operator, call.operator), call.module.endswith(EXPERTS)
        key = (call.module, name, self._came[call.module, name])
        self._came[call.module, name] += 1
        kept = self.found.setdefault(key, {})
        if self._spread and (of_experts or name == "combine_rows"):  # of whose tokens, only their senders know
            return
        for output in outputs:
            if of_experts:
                output = self._by_token(output)
            after = not call.module.startswith("layers.")  # the last norm and the head see only the rows asked for
            own = self._spread and len(output) == self._sizes[2]
            if not own and len(output) != self._sizes[after]:
                continue
            rows, positions = self._places[2 if own else after]
            for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
                kept.setdefault(position, []).append(output[row].detach().clone())

    def _by_token(self, output: Tensor) -> Tensor:
        """Return the rows of this process's experts by token, [N, K, ...], zeros for those of others."""
        held = self._counts.view(self._parts, -1).sum(1) if len(self._counts) % self._parts == 0 else self._counts
        if len(output) != held[self._place]:
            return output
        before = int(held[: self._place].sum())
        order = self._order[before : before + len(output)]
        rows = output.new_zeros(len(self._order), *output.shape[1:])
        return rows.index_copy_(0, order, output).unflatten(0, (self._sizes[0], -1))


def computed(call: Call, compute: Callable[[], Any]) -> Any:
    """Return the output of a call that is watched, by whatever computes it when it is not."""
    if call.operator not in OPERATORS or call.function._schema.is_mutable:
        return compute()
    return compute_with(AUTO, call.operator, call.function, call.inputs)


def _places(here: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    rows = here.nonzero().flatten()
    return rows, positions[rows]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Compare bit by bit. A token that was computed several times, after preemption for instance, has all its rows."""
    return all(
        torch.equal(_bits(a), _bits(b)) for start in range(0, len(theirs), len(ours))
        for a, b in zip(ours, theirs[start:], strict=False)
    )  # fmt: skip


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x
