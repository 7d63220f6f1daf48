"""Run by `test_device.py` in a process of its own: the same work on the CPU and on a device that torch learnt
about only now. Prints one JSON object of the numbers of both."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import stand_in_device
from liaoyuan.device import list_devices, select_device
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, ModelConfig, initialise, packed_context
from liaoyuan.models.config import Experts
from liaoyuan.training.optimiser import AdamW

DENSE = ModelConfig("qwen3", 96, 32, 48, 2, 4, 2, 16, tie_word_embeddings=True, qk_norm=True)
BF16 = ModelConfig("llama", 96, 32, 48, 2, 4, 2, 16, dtype="bfloat16")
EXPERTS = ModelConfig("qwen3_moe", 96, 32, 48, 2, 4, 2, 16, qk_norm=True, experts=Experts(4, 2, 16))


def losses(config: ModelConfig, device: torch.device) -> list[float]:
    """Return the losses of three training steps on two packed documents."""
    model = initialise(Decoder(config), seed=0).to(device)
    tokens = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(1))
    positions, context = packed_context([10, 14], device)
    optimiser, found = AdamW(model.named_parameters()), []
    for _ in range(3):
        loss = -model(tokens.to(device), positions, context, targets=tokens.roll(-1).to(device)).mean()
        loss.backward()
        optimiser.step(learning_rate=1e-2)
        found.append(loss.item())
    return found


def generated(config: ModelConfig, device: torch.device) -> list[list[int]]:
    """Return what the engine writes for three prompts, greedily."""
    engine = Engine(initialise(Decoder(config), seed=0).to(device), EngineConfig(max_sequences=4, cache_tokens=512))
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    return [done.tokens for done in engine.generate([Request(i, (1, 2, 3 + i), greedy) for i in range(3)])]


def main() -> None:
    torch.set_num_threads(1)
    found = select_device("auto")
    places = {"cpu": torch.device("cpu"), "device": found.torch}
    found.synchronize()
    print(
        json.dumps(
            {
                "name": f"{found.type}:{found.index}",
                "expected_name": f"{stand_in_device.NAME}:0",
                "listed": list_devices(),
                "dense": {name: losses(DENSE, place) for name, place in places.items()},
                "bf16": {name: losses(BF16, place) for name, place in places.items()},
                "experts": {name: losses(EXPERTS, place) for name, place in places.items()},
                "generated": {name: generated(DENSE, place) for name, place in places.items()},
                "operators_on_device": len(stand_in_device.SEEN),
            }
        )
    )


if __name__ == "__main__":
    main()
