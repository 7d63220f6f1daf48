"""Where two ways to compute a token part: the first operator whose output has other bits."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from liaoyuan.inference.exactness.paths import Path, Probe
from liaoyuan.models import Decoder, packed_context
from liaoyuan.models.decoder import Layer
from liaoyuan.ops.choice import AUTO, compute_with, operators_called
from liaoyuan.ops.decoder_layer import layer_kernel
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.watch import Call, Watch, tensors_in

SAME = {"paged_attention": "attention"}  # operators that compute the same, each in its own way
ALONE = ("permute_rows", "write_cache")  # they only move rows
EXPERTS = ".experts"  # what modules are called that get rows sorted by expert
HEAD = "the softmax of the head (loss_head, sample_tokens or log_sum_exp): the logits are equal"
LAYER = "decoder_layer: its parts alone give the same bits"

Key = tuple[str, str, int]  # module, operator, how many times it came before in this forward pass


def operators_of(model: Decoder, probes: Sequence[Probe], paths: Sequence[Path]) -> set[str]:
    """Return the operators of this package that the paths call."""
    seen = set()

    def around(call: Call, compute: Callable[[], Any]) -> Any:
        seen.add(call.operator)
        return _computed(call, compute)

    with operators_called(), Watch(model, around):
        for path in paths:
            path.run(model, probes)
    return seen & OPERATORS.keys()


def first_difference(model: Decoder, probes: Sequence[Probe], path: Path, wrong: Sequence[tuple[int, int]]) -> str:
    """Run a path again and return the first operator, with its module, whose output for any token of a probe has other
    bits than when that probe alone passes training's forward; "" if none is found.

    wrong: probes and the positions after which their log-probabilities differ.
    """
    number, position = next((place for place in wrong if not _is_shared(probes, *place)), wrong[0])
    ours, theirs = _Recorder(model, probes, number), _Recorder(model, probes, number)
    with ours.recording(), torch.enable_grad():
        tokens = torch.tensor(probes[number].text[:-1], device=model.embed_tokens.weight.device)
        model(tokens, *packed_context([len(tokens)], tokens.device))
    with theirs.recording():
        path.run(model, probes)
    last: set[int] = set()
    for key, rows in ours.found.items():
        other = theirs.found.get(key, {})
        last = rows.keys() & other.keys()
        if any(not _same(rows[position], other[position]) for position in last):
            return f"{key[1]} of {key[0] or 'the model'}"
    if _has_whole_layers(model):
        return LAYER
    return HEAD if position in last else ""


def _has_whole_layers(model: Decoder) -> bool:
    """Return whether decoding computes layers in one call, which a recording takes apart."""
    with torch.no_grad():
        kernel = layer_kernel(model.embed_tokens.weight, model.config.head_dim)
    layers = (layer for layer in model.layers if isinstance(layer, Layer))
    return kernel is not None and any(layer.plain.of(layer) for layer in layers)


class _Recorder:
    """Keeps what every operator gives for the tokens of one probe, whatever batch they are in.

    A row of a batch is the probe's if it has its token at its position, and no other probe has that token there.
    """

    def __init__(self, model: Decoder, probes: Sequence[Probe], number: int) -> None:
        self._model, text = model, probes[number].text
        shared = [_is_shared(probes, number, place) for place in range(len(text))]
        self._text = torch.where(torch.tensor(shared), -1, torch.tensor(text))
        self.found: dict[Key, dict[int, list[Tensor]]] = {}
        self._places: list[tuple[Tensor, Tensor]] = []  # the probe's rows and positions: of all, and of those asked for
        self._sizes: list[int] = []
        self._order = torch.empty(0, dtype=torch.long)
        self._came: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
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
        here = (positions < len(self._text)) & (self._text[positions.clamp_max(len(self._text) - 1)] == tokens)
        asked = named.get("rows")
        chosen = torch.arange(len(tokens)) if asked is None else asked.cpu()
        self._places = [_places(here[rows], positions[rows]) for rows in (torch.arange(len(tokens)), chosen)]
        self._sizes = [len(tokens), len(chosen)]
        self._came.clear()

    def _end(self, module: Any, inputs: Any, output: Any) -> None:
        self._sizes = []

    def _around(self, call: Call, compute: Callable[[], Any]) -> Any:
        output = _computed(call, compute)
        if call.operator == "permute_rows":
            self._order = output[1]
        if self._sizes and call.operator in OPERATORS and call.operator not in ALONE:
            self._keep(call, list(tensors_in(output)))
        return output

    def _keep(self, call: Call, outputs: list[Tensor]) -> None:
        name = SAME.get(call.operator, call.operator)
        key = (call.module, name, self._came[call.module, name])
        self._came[call.module, name] += 1
        kept = self.found.setdefault(key, {})
        for output in outputs:
            if call.module.endswith(EXPERTS) and len(output) == len(self._order):
                output = torch.empty_like(output).index_copy_(0, self._order, output).unflatten(0, (self._sizes[0], -1))
            after = not call.module.startswith("layers.")  # the last norm and the head see only the rows asked for
            if len(output) != self._sizes[after]:
                continue
            rows, positions = self._places[after]
            for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
                kept.setdefault(position, []).append(output[row].detach().clone())


def _computed(call: Call, compute: Callable[[], Any]) -> Any:
    if call.operator not in OPERATORS or call.function._schema.is_mutable:
        return compute()
    return compute_with(AUTO, call.operator, call.function, call.inputs)


def _is_shared(probes: Sequence[Probe], number: int, position: int) -> bool:
    """Return whether another probe has the same token at this position."""
    token = probes[number].text[position]
    others = [probe.text for place, probe in enumerate(probes) if place != number and position < len(probe.text)]
    return any(text[position] == token for text in others)


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
