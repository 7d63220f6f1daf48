"""How large a checkpoint is: weights, master copies and moments of the optimiser, each held once by all processes."""

from liaoyuan.models import ModelConfig
from liaoyuan.training.loop import TrainConfig

FP32, MOMENTS = 4, 2  # bytes; moments of AdamW, which are in fp32 whatever the weights are


def state_bytes(model: ModelConfig, train: TrainConfig) -> float:
    """Return the bytes of a training state, closed form; of copies that data ranks share, one is counted.

    14 a weight for AdamW over bf16 weights with fp32 masters, 12 over fp32 weights, 10 over bf16 weights alone. Muon
    keeps one moment of a matrix, two of the embedding and the head.
    """
    width = model.torch_dtype.itemsize
    master = FP32 if width < FP32 and train.master_dtype == "float32" else 0
    weights = model.num_parameters()
    if train.optimiser == "adamw":
        return float(weights * (width + master + MOMENTS * FP32))
    matrices = model.num_parameters(embedding=False)
    return float(weights * (width + master + MOMENTS * FP32) - matrices * FP32)
