"""Whether a decoder layer is what `ops.decoder_layer` or `quantised_decoder_layer` computes, and the weights that it
takes then.

To gather them costs as much as the call, so it is done once. Layers may change, when they are sharded, quantised, given
an adapter or other weights: each step looks whether all is where it was found.
"""

from itertools import repeat
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from liaoyuan.models.attention import Attention
from liaoyuan.models.layers import FeedForward, Linear
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.ops import FewBits, LayerWeights

MISSING = object()


class Plain(NamedTuple):
    """What of the layer's own the operator takes. layer: its number.

    arguments: `LayerWeights`, `FewBits` if its projections have those, scale, window and eps, one by one.
    """

    layer: int
    has_few_bits: bool
    arguments: tuple[Any, ...]


class PlainLayer:
    """The `Plain` of one layer, None if it is more than either operator: latent attention, experts, more norms,
    projections that are sharded or adapted, or not all quantised alike.
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
            if type(projection) not in (Linear, QuantisedLinear) or getattr(projection, "adapter", None) is not None:
                return None
        data = [self._weight(one) if type(one) is Linear else self._part(one, "data") for one in projections]
        biases, bits = [self._weight(one, "bias") for one in projections], self._bits(projections)
        qkv, output, gate_up, down = zip(data, biases, strict=True)
        names = ("q_norm", "k_norm") if attention.qk_norm else ()
        norms = [self._weight(self._module(attention, name)) for name in names] or [None, None]
        before = self._weight(self._module(layer, "input_layernorm"))
        after = self._weight(self._module(layer, "post_attention_layernorm"))
        sinks = self._weight(attention, "sinks")
        parameters = [before, after, *norms, sinks, *biases, *(() if bits else data)]
        if any(type(one) is not nn.Parameter or one.dtype is not before.dtype for one in parameters if one is not None):
            return None
        parts = (*data, *bits.scales, *bits.zeros) if bits else ()
        if bits is None or any(type(one) is not Tensor or not one.is_contiguous() for one in parts):
            return None
        weights = LayerWeights(*(before, *qkv, *norms, sinks, *output, after, *gate_up, *down))
        settings = (attention.scale, attention.window, attention.eps)
        return Plain(attention.layer, bool(bits), (*weights, *bits, *settings))

    def _bits(self, projections: list[Any]) -> FewBits | tuple[()] | None:
        """Return what the projections have beside their weights: nothing if those are whole; None: they differ."""
        few = [one for one in projections if type(one) is QuantisedLinear]
        if not few:
            return ()
        scales, zeros = ([self._part(one, name) for one in few] for name in ("scales", "zeros"))
        zeros = [one for one in zeros if one is not None]
        if len(few) < len(projections) or len(zeros) not in (0, len(few)):
            return None
        kinds = {(one.kind, one.group or 0) for one in few}
        return FewBits(scales, zeros, *kinds.pop()) if len(kinds) == 1 else None

    def _module(self, parent: nn.Module, name: str) -> Any:
        return self._look(parent._modules, name)

    def _weight(self, parent: nn.Module, name: str = "weight") -> Any:
        return self._look(parent._parameters, name)

    def _part(self, parent: nn.Module, name: str) -> Any:
        return self._look(parent._buffers, name)

    def _look(self, place: dict[str, Any], name: str) -> Any:
        part = place.get(name, MISSING)
        self._places.append(place)
        self._names.append(name)
        self._parts.append(part)
        return None if part is MISSING else part
