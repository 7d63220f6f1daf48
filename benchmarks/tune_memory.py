"""Memory that fine-tuning needs at its peak: all weights, adapters, and adapters on weights of few bits.

Each way is a process of its own that runs `tune sft` for a few steps; shown is what it holds at most (VmHWM) beyond
what it held before the model, on Linux.

    python benchmarks/tune_memory.py --size m120 --tokens 512
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = {  # method, and the bits of the base
    "full": ("full", "whole"),
    "LoRA": ("lora", "whole"),
    "DoRA": ("dora", "whole"),
    "LoRA on int8": ("lora", "int8"),
    "LoRA on int4": ("lora", "int4"),
}
SIZES = {  # hidden, intermediate, layers, query heads, key-value heads, vocabulary
    "m8": (320, 960, 6, 5, 5, 4096),
    "m34": (512, 1536, 8, 8, 4, 16384),
    "m120": (768, 2304, 12, 12, 4, 32768),
}


def main() -> None:
    options = parse()
    if options.way:
        print(json.dumps(run(options)))
        return
    with tempfile.TemporaryDirectory() as place:
        write_start(Path(place), options.size, options.dtype)
        print(f"{options.size} in {options.dtype}, {options.tokens} tokens a step, {options.steps} steps", flush=True)
        for way in WAYS:
            again = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--place", place]
            done = subprocess.run(again, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{way:14} {row['trained'] / 1e6:7.2f}M of {row['parameters'] / 1e6:.1f}M trained  "
                f"peak {row['peak'] / 1e6:7.0f} MB  state on disk {row['state'] / 1e6:7.1f} MB  "
                f"{row['cpu_seconds']:.1f} CPU-seconds",
                flush=True,
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="m34", choices=SIZES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step, in one row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_start(place: Path, size: str, dtype: str) -> None:
    """Write a model with random weights and records to learn."""
    from liaoyuan.checkpoint import save_model
    from liaoyuan.data import Message, Record, train_tokenizer, write_records
    from liaoyuan.models import Decoder, ModelConfig, initialise

    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SIZES[size]
    words = [" ".join(str(n * m % 997) for m in range(200)) for n in range(1, 40)]
    train_tokenizer(words, 400).save(place / "tokenizer")
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=64,
        tie_word_embeddings=True,
        qk_norm=True,
        dtype=dtype,
    )
    save_model(initialise(Decoder(config), 0), place / "model", place / "tokenizer")
    texts = [Record(id=str(n), kind="text", messages=(Message(role="user", content=w),)) for n, w in enumerate(words)]
    write_records(place / "data.jsonl", texts)


def run(options: argparse.Namespace) -> dict[str, float]:
    """Fine-tune one way in this process."""
    from liaoyuan.cli.process import tune_process

    tune_process()
    import torch

    from liaoyuan.tuning.lora import LoraConfig
    from liaoyuan.tuning.sft_config import SftConfig, SftTrain
    from liaoyuan.tuning.sft_run import run_sft

    torch.set_num_threads(1)
    method, base = WAYS[options.way]
    place, out = Path(options.place), Path(options.place) / options.way.replace(" ", "-")
    before = memory("VmRSS")
    config = SftConfig(
        model=place / "model",
        data=place / "data.jsonl",
        method=method,
        lora=LoraConfig(base=base),
        validation_share=0.0,
        train=SftTrain(steps=options.steps, batch_tokens=options.tokens),
        sequence_length=options.tokens,
        device="cpu",
    )
    done = run_sft(config, out)
    state = sum(file.stat().st_size for file in (out / "state").rglob("*.safetensors"))
    return {
        "peak": memory("VmHWM") - before,
        "state": state,
        "trained": done["trained_parameters"],
        "parameters": done["parameters"],
        "cpu_seconds": done["cpu_seconds"],
    }


def memory(name: str) -> int:
    """Return bytes of this process as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
