"""Models and machines on which serving is planned in tests."""

from typing import Any

from liaoyuan.compute.plan import Cluster, read_cluster
from liaoyuan.compute.plan.machine.profile import DeviceProfile, assumed
from liaoyuan.compute.plan.serving import EngineRates, Replica, Served, StepPrice
from liaoyuan.inference import EngineConfig
from liaoyuan.models import ModelConfig, config_from_dict
from tests.parallel.layouts import MODELS

BIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def big() -> ModelConfig:
    return config_from_dict(BIG)


def small(kind: str, **changes: Any) -> ModelConfig:
    return config_from_dict(MODELS[kind] | {"torch_dtype": "float32"} | changes)


def price_of(
    served: Served,
    cluster: Cluster | None = None,
    profile: DeviceProfile | None = None,
    rates: EngineRates | None = None,
) -> StepPrice:
    cluster = cluster or read_cluster("h100")
    return StepPrice(served, cluster, (profile or assumed(cluster)).median(), rates or EngineRates())


def replica(price: object, blocks: int = 4096, most: int = 4096, **sizes: Any) -> Replica:
    return Replica(price, EngineConfig(**sizes), blocks, most)  # type: ignore[arg-type]
