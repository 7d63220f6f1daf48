"""Whether a decoder layer is what `ops.decoder_layer` computes, and the weights that it takes then.

To gather them costs as much as the call, so it is done once. Layers may change, when they are sharded, quantised, given
an adapter or other weights: each step looks whether all is where it was found.
"""

from itertools import repeat
from operator import is_
from typing import Any, NamedTuple

from torch import nn

from liaoyuan.models.attention import Attention
from liaoyuan.models.layers import FeedForward, Linear
from liaoyuan.ops import LayerWeights

MISSING = object()


class Plain(NamedTuple):
    """What of the layer's own `ops.decoder_layer` takes. layer: its number; settings: scale, window, eps."""

    layer: int
    weights: LayerWeights
    settings: tuple[float, int | None, float]


class PlainLayer:
    """The `Plain` of one layer, None if it is more than that operator: latent attention, experts, more norms,
    projections that are sharded, quantised or adapted.
    """

    def __init__(self) -> None:
        self._plain: Plain | None = None
        # Where each part was, by name, and what it was.
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._parts: list[object] = []

    def of(self, layer: nn.Module) -> Plain | None:
        """Return it; layer: always the same one, which is not kept, or the two would keep each other."""
        now = map(dict.get, self._places, self._names, repeat(MISSING))
        if not self._parts or not all(map(is_, now, self._parts)):
            self._places, self._names, self._parts = [], [], []
            self._plain = self._gather(layer)
        return self._plain

    def _gather(self, layer: nn.Module) -> Plain | None:
        attention, mlp = self._module(layer, "self_attn"), self._module(layer, "mlp")
        if type(attention) is not Attention or type(mlp) is not FeedForward or layer.post_norms:
            return None
        projections = [self._module(attention, "qkv_proj"), self._module(attention, "o_proj")]
        projections += [self._module(mlp, "gate_up_proj"), self._module(mlp, "down_proj")]
        for projection in projections:
            self._look(projection.__dict__, "adapter")
            if type(projection) is not Linear or getattr(projection, "adapter", None) is not None:
                return None
        qkv, output, gate_up, down = ((self._weight(one), self._weight(one, "bias")) for one in projections)
        names = ("q_norm", "k_norm") if attention.qk_norm else ()
        norms = [self._weight(self._module(attention, name)) for name in names] or [None, None]
        before = self._weight(self._module(layer, "input_layernorm"))
        after = self._weight(self._module(layer, "post_attention_layernorm"))
        weights = LayerWeights(
            *(before, *qkv, *norms, self._weight(attention, "sinks"), *output, after, *gate_up, *down)
        )
        if any(type(one) is not nn.Parameter or one.dtype is not before.dtype for one in weights if one is not None):
            return None
        return Plain(attention.layer, weights, (attention.scale, attention.window, attention.eps))

    def _module(self, parent: nn.Module, name: str) -> Any:
        return self._look(parent._modules, name)

    def _weight(self, parent: nn.Module, name: str = "weight") -> Any:
        return self._look(parent._parameters, name)

    def _look(self, place: dict[str, Any], name: str) -> Any:
        part = place.get(name, MISSING)
        self._places.append(place)
        self._names.append(name)
        self._parts.append(part)
        return None if part is MISSING else part
