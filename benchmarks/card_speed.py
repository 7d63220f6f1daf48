"""What a card gives: generation by the engine, and its own kernels beside the vendor's products and attention.

    python benchmarks/card_speed.py --models b2 b8 --concurrency 1 8 32 64     # tokens a second, share of the limit
    python benchmarks/card_speed.py --kernels                                   # products and attention, TFLOP/s

Weights are random and of the shapes of Qwen3-1.7B and Qwen3-8B, in bf16; decoding is greedy, or with `--sampled` at a
temperature of 0.8 with top-p 0.95 and top-k 50, nobody stops early, no prompt begins as another. A step's time is that
of all tokens less that of the first ones, over their number; its limit is to read all weights once at the rate of
copying that was measured just before. `--ops linear=triton` takes the kernels of exactness. With `--peer` also
transformers' `generate` on the same shapes, in its usual way (SDPA, dynamic cache).
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from liaoyuan import ops
from liaoyuan.device import Device, measure_memory_rate, select_device
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.graphs import capture_on_device
from liaoyuan.models import Decoder, config_from_dict

SIZES = {  # hidden, intermediate, layers, query heads, key-value heads, head size, vocabulary, tied
    "tiny": (128, 384, 2, 4, 2, 32, 512, True),
    "b2": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "b8": (4096, 12288, 36, 32, 8, 128, 151936, False),
}
SHAPES = ((12288, 4096), (24576, 4096), (4096, 4096), (4096, 12288))  # of an 8B model's weights, and one between
ROWS = (1, 64, 1024, 8192)
COPIED = 4e8  # bytes of weights that a measurement walks through, so that no cache holds them


def main() -> None:
    options = parse()
    device = select_device(options.device)
    ops.configure(dict(pair.partition("=")[::2] for pair in options.ops))
    copying = measure_memory_rate(64 if device.is_cpu else 1024, device=device.type)
    print(f"{device.torch}: {copying / 1e12:.2f} TB/s copied, torch {torch.__version__}", flush=True)
    rows: list[dict] = []
    if options.kernels:
        kernels(device, copying)
    else:
        for name in options.models:
            rows += generation(name, device, copying, options)
            if options.peer:
                peer(name, device, options)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["b2", "b8"], choices=SIZES)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top-p 0.95, top-k 50")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="launch each kernel from Python")
    parser.add_argument("--peer", action="store_true", help="also transformers")
    parser.add_argument("--kernels", action="store_true", help="products and attention instead")
    parser.add_argument("--ops", nargs="*", default=[], metavar="NAME=KERNEL", help="as [ops] of a run file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


def shape_of(name: str) -> dict:
    """Return the keys of a Hugging Face config."""
    hidden, intermediate, layers, heads, key_value_heads, head, vocabulary, tied = SIZES[name]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }


def random_model(name: str, device: Device) -> Decoder:
    with device.torch:
        model = Decoder(config_from_dict({"model_type": "qwen3", "torch_dtype": "bfloat16", **shape_of(name)}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0, 0.02)
    return model.eval()


def generation(name: str, device: Device, copying: float, options: argparse.Namespace) -> list[dict]:
    model = random_model(name, device)
    size = sum(weight.nbytes for weight in model.parameters())
    most = max(options.concurrency)
    room = most * (options.prompt + options.output + 64)
    graphs = None if options.graphs else False
    sizes = EngineConfig(max_sequences=most, max_batch_tokens=8192, cache_tokens=room, graphs=graphs)
    engine, found = Engine(model, sizes), []
    start = time.perf_counter()
    engine.generate(asked(1, 2, model.config.vocab_size, options, 0))
    print(f"{name:>5}: kernels chosen and a first answer in {time.perf_counter() - start:.1f} s", flush=True)
    for count in options.concurrency:
        whole, first = [], []
        for turn in range(options.rounds + 1):  # the first captures its graphs
            for new, took in ((options.output, whole), (1, first)):
                requests = asked(count, new, model.config.vocab_size, options, turn + 100 * new)
                start = time.perf_counter()
                engine.generate(requests)
                took += [time.perf_counter() - start] if turn else []
        step = (statistics.median(whole) - statistics.median(first)) / (options.output - 1)
        rate, share = count * options.output / statistics.median(whole), size / copying / step
        print(
            f"{name:>5} ({size / 2e9:.1f}B)  {count:>3} at once  {rate:8.0f} tokens/s, {1e3 * step:6.2f} ms a step, "
            f"{share:4.0%} of the limit, {1e3 * statistics.median(first):5.0f} ms to the first tokens",
            flush=True,
        )
        found.append({"model": name, "concurrency": count, "tokens_per_second": rate, "step": step, "limit": share})
    return found


def asked(count: int, new: int, vocabulary: int, options: argparse.Namespace, seed: int) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, vocabulary, (count, options.prompt), generator=generator).tolist()
    how = {"temperature": 0.8, "top_p": 0.95, "top_k": 50} if options.sampled else {"temperature": 0.0}
    return [
        Request(i, tuple(prompt), SamplingParams(max_tokens=new, seed=i, **how)) for i, prompt in enumerate(prompts)
    ]


def peer(name: str, device: Device, options: argparse.Namespace) -> None:
    import transformers

    config = transformers.Qwen3Config(**shape_of(name))
    with device.torch:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    for count in options.concurrency:
        tokens = torch.randint(1, config.vocab_size, (count, options.prompt), device=device.torch)
        took = []
        for _ in range(options.rounds + 1):
            device.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=options.output,
                    min_new_tokens=options.output,
                    do_sample=False,
                    pad_token_id=0,
                )
            device.synchronize()
            took.append(time.perf_counter() - start)
        rate = count * options.output / statistics.median(took[1:])
        print(f"{name:>5}  {count:>3} at once  {rate:8.0f} tokens/s  transformers", flush=True)


def seconds(work: Callable[[], object], device: Device, repeats: int = 8) -> float:
    """Return the median of some runs, each waited for."""
    took = []
    for _ in range(repeats + 2):
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:])


def replayed(work: Callable[[], object], device: Device) -> Callable[[], object]:
    """Return what does the work again without launching it from Python, where the device can."""
    return capture_on_device(lambda: (work(), None))[1] if device.captures_graphs else work  # type: ignore[arg-type]


def kernels(device: Device, copying: float) -> None:
    """Print the rate of products, and the share of what copying their bytes takes."""
    ops.configure({"linear": "triton"})
    for columns, width in SHAPES:
        copies = max(2, int(COPIED / (2 * columns * width)))
        weights = [torch.randn(columns, width, device=device.torch).bfloat16() for _ in range(copies)]
        for rows in ROWS:
            x = torch.randn(rows, width, device=device.torch).bfloat16()
            told = []
            for name, product in (("ours", ops.linear), ("the vendor's", F.linear)):
                work = functools.partial(lambda f, x: [f(x, one) for one in weights], product, x)  # noqa: B023
                with torch.no_grad():
                    took = seconds(replayed(work, device), device) / copies
                share = 2 * (columns * width + rows * (columns + width)) / copying / took
                told.append(f"{name} {2 * rows * columns * width / took / 1e12:6.1f} TFLOP/s, {share:4.0%} of copying")
            print(f"product {rows:>5} x {columns} x {width}: {'; '.join(told)}", flush=True)
    documents, length, heads, key_heads, dim = 4, 4096, 32, 8, 128
    shapes = [(documents * length, count, dim) for count in (heads, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, device=device.torch).bfloat16() for shape in shapes)
    ends = torch.arange(0, documents * length + 1, length, device=device.torch, dtype=torch.int32)
    flops = 2 * documents * heads * dim * length**2
    as_batch = [x.view(documents, length, -1, dim).transpose(1, 2) for x in (query, key, value)]
    with torch.no_grad():
        own = seconds(lambda: ops.attention(query, key, value, ends, dim**-0.5), device)
        vendor = seconds(lambda: F.scaled_dot_product_attention(*as_batch, is_causal=True, enable_gqa=True), device)
    print(f"attention: {flops / own / 1e12:.0f} TFLOP/s, PyTorch's {flops / vendor / 1e12:.0f}", flush=True)
    for name, inputs, work in (
        ("", (query, key, value), lambda *x: ops.attention(*x, ends, dim**-0.5)),
        (
            "PyTorch's",
            as_batch,
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True),
        ),
    ):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = work(*leaves)
        grad = torch.randn_like(out)
        took = seconds(
            lambda out=out, leaves=leaves, grad=grad: torch.autograd.grad(out, leaves, grad, retain_graph=True), device
        )
        print(f"attention, backward: {name} {2.5 * flops / took / 1e12:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
