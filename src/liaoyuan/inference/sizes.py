"""The sizes of an engine, and how many cache blocks they come to."""

from typing import Literal

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.device import Device
from liaoyuan.inference.cache import cached_layers
from liaoyuan.models import Decoder

CACHE_BYTES = 2**30
FREE_SHARE = 0.85  # of a card's free memory: the rest is for the step itself


class EngineConfig(Config):
    """Sizes of an engine.

    max_sequences: how many run at once. max_batch_tokens: tokens of one step, decode and prefill together.
    cache_tokens: size of the cache; None: enough for all sequences at full length, within `cache_bytes`.
    cache_bytes: None: 1 GiB on a CPU, most of what is free on a card, which nobody else should need then.
    prefix_cache: keep keys and values of what was computed, for prompts that begin alike.
    speculate: "ngram" guesses next tokens from those before, "mtp" with the model's own layer for the token after the
        next; "" does not guess. speculate_tokens: guesses in a step.
    decode_steps: the most steps between two looks at who comes and goes while all decode, in `ROUND_SECONDS`; tokens
        are told late then, and a sequence that ends before the last of them computes on in vain.
    graphs: capture decode steps in device graphs (on a CPU: record their calls); None: where the device can.
    seed: of requests that bring none.
    exact: whether every way to compute a token is known to give the same bits. True: prove it before anything is
        computed, or refuse; False: it is known that they do not; None: nobody asked.
    """

    max_sequences: int = 256
    max_batch_tokens: int = 2048
    block_size: int = 16
    cache_tokens: int | None = None
    cache_bytes: int | None = CACHE_BYTES
    prefix_cache: bool = True
    speculate: Literal["", "ngram", "mtp"] = ""
    speculate_tokens: int = 8
    decode_steps: int = Field(4, ge=1)
    graphs: bool | None = None
    seed: int = 0
    exact: bool | None = None


def num_blocks(model: Decoder, config: EngineConfig, draft: Decoder | None = None) -> int:
    """Return how many blocks the cache of a model has, and that of its draft model."""
    if config.cache_tokens is not None:
        return max(1, config.cache_tokens // config.block_size)
    longest = -(-model.config.max_position_embeddings // config.block_size)
    block_bytes, room = _block_bytes(model, config), config.cache_bytes
    if room is None:
        place = model.embed_tokens.weight.device
        free = Device(place.type, place.index).free_memory()
        room = CACHE_BYTES if free is None else int(FREE_SHARE * free)
        block_bytes += _block_bytes(draft, config) if draft is not None and free is not None else 0
    return max(longest, min(config.max_sequences * longest, room // block_bytes))


def _block_bytes(model: Decoder, config: EngineConfig) -> int:
    shape = model.config
    width = cached_layers(shape) * model.key_value_heads * (shape.head_dim + shape.value_head_dim)
    return width * shape.torch_dtype.itemsize * config.block_size
