"""What a family is, and what all of them read and write alike."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models.config import DTYPES, ModelConfig
from liaoyuan.models.rotary import PLAIN_ROTARY, SCALINGS, Rotary
from liaoyuan.models.stored import COPIES, Part, Parts, common_parts, further_copies, further_parts

Values = Mapping[str, Any]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
PLAIN = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("initializer_range", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"),
)
FURTHER = "num_nextn_predict_layers"
NO_FEATURES: Callable[..., dict[str, Any]] = lambda *_: {}  # noqa: E731


@dataclass(frozen=True)
class Family:
    """A family's words.

    features: (contents of `config.json`, the config read so far) -> further fields of `ModelConfig`.
    words: the reverse, entries of `config.json` for the features. parts: see `stored.Parts`.
    predicts_further: its files may hold further layers for predicting several tokens, which the decoder does not need.
    rotary: the family's own rotary embedding where its files are silent.
    """

    model_type: str
    architecture: str
    features: Callable[[Values, ModelConfig], dict[str, Any]] = NO_FEATURES
    words: Callable[[ModelConfig], dict[str, Any]] = NO_FEATURES
    parts: Parts = common_parts
    predicts_further: bool = False
    rotary: Rotary = PLAIN_ROTARY
    rms_norm_eps: float = 1e-6

    def read(self, values: Values, where: str, further: bool = False) -> ModelConfig:
        """Return the config that `config.json` describes, with its further layers if they are asked for.

        Raises:
            LiaoyuanError: something in it is not supported.
        """
        _refuse_unsupported(values, where)
        chosen = {name: values[name] for name in PLAIN if values.get(name) is not None}
        heads = values["num_attention_heads"]
        chosen.setdefault("num_key_value_heads", heads)
        chosen.setdefault("head_dim", values["hidden_size"] // heads)
        chosen.setdefault("rms_norm_eps", self.rms_norm_eps)
        chosen.setdefault("dtype", values.get("torch_dtype") or "float32")
        for name in ("eos_token_id", "bos_token_id"):
            chosen[name] = _first(values.get(name))
        rotary = _read_rotary(values, self.rotary, where)
        config = ModelConfig(self.model_type, rotary=rotary, **chosen)
        try:
            config = replace(config, **self.features(values, config))
            if further and self.predicts_further:
                config = replace(config, further_layers=values.get(FURTHER) or 0)
        except KeyError as error:
            raise LiaoyuanError(f"{where}: '{error.args[0]}' is missing, which a {self.model_type} needs.") from None
        _check(config, where)
        return config

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the contents of `config.json`."""
        names = {"architectures": [self.architecture], "model_type": self.model_type}
        values: dict[str, Any] = {**names, "hidden_act": "silu"}
        values |= {name: getattr(config, name) for name in PLAIN}
        if config.further_layers:
            values[FURTHER] = config.further_layers
        return values | _write_rotary(config.rotary) | self.words(config)

    def stored(self, name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
        """Return the tensors of a folder that fill our tensor `name`, or that it fills."""
        return further_parts(name, ours, config, self.parts) or self.parts(name, ours, config)

    def written(self, name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
        """Return the tensors of a folder to write for ours: also the copies that nobody need read."""
        return self.stored(name, ours, config) + further_copies(name, ours, config)

    def is_unused(self, name: str, config: ModelConfig) -> bool:
        """Return whether the decoder can do without this tensor of a folder."""
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if layer is None or not self.predicts_further:
            return name.endswith("rotary_emb.inv_freq")
        further = int(layer[1]) - config.num_hidden_layers
        known = further < config.further_layers and layer[2] not in COPIES.values()
        return name.endswith("rotary_emb.inv_freq") or (further >= 0 and not known)


def sliding(values: Values, default: int | None = None) -> dict[str, Any]:
    """Return the fields of a sliding window that every layer has."""
    window = values.get("sliding_window", default)
    return {"sliding_window": window}


def sliding_by_type(values: Values, config: ModelConfig, types: list[str]) -> dict[str, Any]:
    """Return the fields of a sliding window that some layers have."""
    types = values.get("layer_types") or types
    full = tuple(n for n, kind in enumerate(types) if kind == "full_attention")
    if len(full) == config.num_hidden_layers:
        return {"sliding_window": None, "full_layers": ()}
    return {"sliding_window": values.get("sliding_window"), "full_layers": full}


def layer_types(config: ModelConfig) -> list[str]:
    """Return Hugging Face's word for each layer's attention."""
    kinds = {True: "full_attention", False: "sliding_attention"}
    return [kinds[config.window(layer) is None] for layer in range(config.num_hidden_layers)]


def _check(config: ModelConfig, where: str) -> None:
    if config.dtype not in DTYPES:
        raise LiaoyuanError(f"{where}: dtype '{config.dtype}' is not one of {', '.join(DTYPES)}.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise LiaoyuanError(f"{where}: num_key_value_heads must divide num_attention_heads.")
    if config.rotary.width(config.head_dim) % 2:
        raise LiaoyuanError(f"{where}: the rotated part of a head must have an even number of dimensions.")
    e = config.experts
    if e and not 0 < e.num_experts_per_tok <= e.num_experts // e.n_group * e.topk_group:
        raise LiaoyuanError(
            f"{where}: num_experts_per_tok ({e.num_experts_per_tok}) must lie between 1 and the number of experts "
            f"that can be chosen ({e.num_experts // e.n_group * e.topk_group})."
        )


def _refuse_unsupported(values: Values, where: str) -> None:
    for name in SIZES:
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise LiaoyuanError(f"{where}: '{name}' must be a whole number above 0 (it is {values.get(name)!r}).")
    if values.get("hidden_act", "silu") != "silu":
        raise LiaoyuanError(f"{where}: hidden_act '{values['hidden_act']}' is not supported (silu is).")


def _read_rotary(values: Values, default: Rotary, where: str) -> Rotary:
    words = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = words.pop("rope_type", None) or words.pop("type", None) or default.rope_type
    if kind not in SCALINGS:
        raise LiaoyuanError(f"{where}: rotary scaling '{kind}' is not supported ({', '.join(SCALINGS)} are).")
    known = {field.name for field in fields(Rotary)} - {"rope_type", "partial", "interleaved"}
    given = {name: words[name] for name in known if words.get(name) is not None}
    for name in ("rope_theta", "original_max_position_embeddings"):
        if values.get(name) is not None:
            given.setdefault(name, values[name])
    partial = words.get("partial_rotary_factor") or values.get("partial_rotary_factor") or default.partial
    rotary = replace(default, rope_type=kind, partial=partial, **given)
    context = values.get("max_position_embeddings", ModelConfig.max_position_embeddings)
    if rotary.rope_type in ("llama3", "yarn") and not rotary.original_max_position_embeddings:
        rotary = replace(rotary, original_max_position_embeddings=context)
    if rotary.rope_type == "yarn" and "factor" not in given and default.rope_type != "yarn":
        rotary = replace(rotary, factor=context / rotary.original_max_position_embeddings)
    return rotary


def _write_rotary(rotary: Rotary) -> dict[str, Any]:
    """Return the words of transformers 4, which everybody reads."""
    words: dict[str, Any] = {"rope_theta": rotary.rope_theta}
    if rotary.partial != 1.0:
        words["partial_rotary_factor"] = rotary.partial
    if rotary.rope_type != "default":
        apart = ("rope_theta", "partial", "interleaved")
        differing = {
            field.name: getattr(rotary, field.name)
            for field in fields(Rotary)
            if field.name not in apart and field.default is not MISSING and getattr(rotary, field.name) != field.default
        }
        if rotary.rope_type == "llama3":  # transformers asks for all of its words
            differing |= {name: getattr(rotary, name) for name in ("low_freq_factor", "high_freq_factor")}
        words["rope_scaling"] = differing | {"factor": rotary.factor}
    return words


def _first(value: int | list[int] | None) -> int | None:
    return value[0] if isinstance(value, list) else value
