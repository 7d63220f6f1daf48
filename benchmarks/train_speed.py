"""Training speed beside a plain transformers loop: same weights, batch, dtype, packing, loss and allocator.

Sides take turns in one process, each round measures all of them once, and medians are shown. A step is forward,
backward, clipping and AdamW. The dtype is the one that this machine multiplies fast (bf16 with AMX or AVX-512 BF16,
else fp32), for every side. In bf16 ours keeps fp32 masters and moments; the peer's modes are bf16 parameters with
torch's fused AdamW (moments in bf16 as well), and fp32 parameters under bf16 autocast. Each mode also runs through
`torch.compile`, the peer's best documented mode (a minute or two to compile, which is not counted).

    python benchmarks/train_speed.py --models m10 m30 --rounds 5 --json train_speed.json
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import torch  # noqa: E402  (after the allocator's settings, which hold for every side)
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from liaoyuan.checkpoint import load_model, save_model  # noqa: E402
from liaoyuan.data import Batch  # noqa: E402
from liaoyuan.device import cpu_name, measure_gemm_rate, select_device  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise, packed_context  # noqa: E402
from liaoyuan.parallel import Program, World  # noqa: E402
from liaoyuan.training.flops import training_flops  # noqa: E402
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step  # noqa: E402

SIZES = {  # hidden, intermediate, layers, query heads, key-value heads, vocabulary
    "m1": (128, 384, 4, 4, 2, 2048),
    "m10": (320, 960, 6, 5, 5, 8192),
    "m30": (512, 1536, 8, 8, 4, 16384),
    "m120": (768, 2304, 12, 12, 4, 32768),
}
transformers.utils.logging.disable_progress_bar()

MODES = {  # of the peer: the dtype of its parameters, and whether bf16 autocast is on
    "bfloat16": {"bf16 parameters": (torch.bfloat16, False), "fp32, bf16 autocast": (torch.float32, True)},
    "float32": {"fp32": (torch.float32, False)},
}
RATE, CLIP, DECAY = 1e-4, 1.0, 0.1
Side = Callable[[], float]  # takes one step, returns its loss


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    gemm_rate = measure_gemm_rate(getattr(torch, options.dtype), seconds=2.0)
    print(f"{cpu_name()}, {options.threads} threads, {options.dtype}, matrix products {gemm_rate / 1e9:,.0f} GFLOP/s")
    rows = []
    for name in options.models:
        measured = measure(name, gemm_rate, options)
        show(measured)
        rows += measured
    if options.json:
        result = {
            "rows": rows,
            "gemm_rate": gemm_rate,
            "settings": vars(options),
            "process": vars(SETTINGS),
            "machine": {"python": platform.python_version(), "torch": torch.__version__, "cpu": cpu_name()},
            "transformers": transformers.__version__,
        }
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["m10", "m30"], choices=SIZES)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of a side in a round")
    parser.add_argument("--threads", type=int, default=2)
    dtype = str(select_device("cpu").default_dtype).removeprefix("torch.")
    parser.add_argument("--dtype", default=dtype, choices=["bfloat16", "float32"], help="of all sides")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile (minutes)")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def measure(name: str, gemm_rate: float, options: argparse.Namespace) -> list[dict[str, float | str]]:
    """Return one row for each side."""
    config = config_of(name, options.dtype)
    batch = invented_batch(config, options)
    sides = all_sides(config, batch, options)
    losses = {side: step() for side, step in sides.items()}
    if max(losses.values()) - min(losses.values()) > 0.02:
        sys.exit(f"The sides do not compute the same loss: {losses}")
    for step in sides.values():
        step()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, step in sides.items():
            for _ in range(options.steps):
                start = time.perf_counter()
                step()
                seconds[side].append(time.perf_counter() - start)
    flops = training_flops(config, batch.boundaries)
    return [
        {
            "model": name,
            "parameters": config.num_parameters(),
            "side": side,
            "tokens_per_second": options.tokens / statistics.median(times),
            "best": options.tokens / min(times),
            "mfu": flops / statistics.median(times) / gemm_rate,
        }
        for side, times in seconds.items()
    ]


def all_sides(config: ModelConfig, batch: Batch, options: argparse.Namespace) -> dict[str, Side]:
    """Return the sides that take part, all with the same weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_model(initialise(Decoder(config), 0), folder)
        sides = {"liaoyuan": our_side(load_model(folder), batch)}
        for mode, (dtype, autocast) in MODES[options.dtype].items() if not options.only_ours else ():
            for compiled in (False, True) if options.compile else (False,):
                label = f"transformers{' + compile' if compiled else ''}, {mode}"
                sides[label] = their_side(folder, dtype, autocast, batch, options.sequence, compiled)
    return sides


def our_side(model: Decoder, batch: Batch) -> Side:
    program = Program([model]).train()
    optimiser = make_optimiser(program, TrainConfig(steps=1, weight_decay=DECAY))
    return lambda: take_step(program, optimiser, [batch], RATE, CLIP, World()).loss


def their_side(folder: Path, dtype: torch.dtype, autocast: bool, batch: Batch, sequence: int, compiled: bool) -> Side:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)
    tokens, targets = batch.tokens.view(-1, sequence), batch.targets

    def loss_of(model: nn.Module) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets)

    compute = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compute(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def config_of(name: str, dtype: str) -> ModelConfig:
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SIZES[name]
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=32 if name == "m1" else 64,
        tie_word_embeddings=True,
        qk_norm=True,
        dtype=dtype,
    )


def invented_batch(config: ModelConfig, options: argparse.Namespace) -> Batch:
    """Return sequences of one length, which need no mask but the causal one: nobody pays for padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (options.tokens + 1,), generator=generator)
    positions, context = packed_context([options.sequence] * (options.tokens // options.sequence))
    return Batch(tokens[:-1], positions, tokens[1:], torch.ones(options.tokens), context.boundaries)


def show(rows: list[dict[str, float | str]]) -> None:
    best = max((row["tokens_per_second"] for row in rows if row["side"] != "liaoyuan"), default=None)
    for row in rows:
        ratio = f"  {row['tokens_per_second'] / best:5.2f} x best peer" if best and row["side"] == "liaoyuan" else ""
        print(
            f"{row['model']:4} {row['parameters'] / 1e6:5.1f}M  {row['side']:44} "
            f"{row['tokens_per_second']:8,.0f} tokens/s  best {row['best']:8,.0f}  MFU {row['mfu']:6.1%}{ratio}",
            flush=True,
        )


if __name__ == "__main__":
    main()
