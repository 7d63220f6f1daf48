"""Where two ways to compute a token part: the first operator whose output has other bits, and in which process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from liaoyuan.inference.exactness.paths import Path, Probe
from liaoyuan.inference.exactness.recorder import NOWHERE, computed
from liaoyuan.inference.exactness.subject import Subject
from liaoyuan.models import Decoder
from liaoyuan.models.decoder import Layer
from liaoyuan.ops.choice import operators_called
from liaoyuan.ops.decoder_layer import layer_kernel
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.watch import Call, Watch

HEAD = "the softmax of the head (loss_head, sample_tokens or log_sum_exp): the logits are equal"
UNSEEN = ", or one of the experts before it: of whose tokens their rows are, training tells nobody"


def operators_of(subject: Subject, probes: Sequence[Probe], paths: Sequence[Path]) -> set[str]:
    """Return the operators of this package that the paths call."""
    seen = set()

    def around(call: Call, compute: Callable[[], Any]) -> Any:
        seen.add(call.operator)
        return computed(call, compute)

    with operators_called(), Watch(subject.model, around):
        for path in paths:
            path.run(subject, probes)
    return seen & OPERATORS.keys()


def first_difference(subject: Subject, probes: Sequence[Probe], path: Path, wrong: Sequence[tuple[int, int]]) -> str:
    """Run a path again and return the first operator, with its module, whose output for any token of a probe has other
    bits than when that probe alone passes the whole model; "" if none is found.

    wrong: probes and the positions after which their log-probabilities differ.
    """
    number, position = next((place for place in wrong if not _is_shared(probes, *place)), wrong[0])
    text = _unshared(probes, number)
    for learns in (False, True) if subject.can_learn else (False,):  # where the two are one forward, once is enough
        subject.record(text, learns)
        subject.pass_alone(probes[number].text, learns)
        subject.record(text, path.learns)
        path.run(subject, probes)
        found = subject.first_differences()
        if min(found) < NOWHERE:
            process = f", in process {found.index(min(found))}" if len(found) > 1 else ""
            unseen = UNSEEN if subject.can_learn and (learns or path.learns) and subject.model.config.experts else ""
            return f"{subject.recordings.operators[min(found)]}{process}{unseen}"
    layer = _whole_layer(subject.model)
    if layer is not None:
        return f"{layer}: its parts alone give the same bits"
    return HEAD if position in subject.recordings.last else ""


def _whole_layer(model: Decoder) -> str | None:
    """Return the operator by which decoding computes a layer in one call, which a recording takes apart, or None."""
    for layer in model.layers:
        plain = layer.plain.of(layer) if isinstance(layer, Layer) else None
        with torch.no_grad():
            if plain and layer_kernel(model.embed_tokens.weight, model.config.head_dim, plain.has_few_bits):
                return "quantised_decoder_layer" if plain.has_few_bits else "decoder_layer"
    return None


def _unshared(probes: Sequence[Probe], number: int) -> Tensor:
    """Return the text of a probe, int64 [L], with -1 where another probe has the same token."""
    text = probes[number].text
    return torch.tensor([-1 if _is_shared(probes, number, place) else token for place, token in enumerate(text)])


def _is_shared(probes: Sequence[Probe], number: int, position: int) -> bool:
    """Return whether another probe has the same token at this position."""
    token = probes[number].text[position]
    others = [probe.text for place, probe in enumerate(probes) if place != number and position < len(probe.text)]
    return any(text[position] == token for text in others)
