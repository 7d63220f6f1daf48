"""How often each expert of a small mixture of experts is chosen, by domain of text: what expert placement is tried on.

Trains a decoder of 4 layers with 64 experts, 4 a token, on a few MB each of Chinese, English, code and maths, then
counts its routers' choices on other text of each domain, window by window. Two routers: `softmax`, which nothing keeps
even, and `sigmoid` with DeepSeek's balancing bias. Writes `counts` int32 [domain, window, layer, expert] as NumPy
arrays in the folder, and beside them the model and the text of each domain, on which `live_experts.py` runs; a killed
run goes on.

    python benchmarks/expert_traces.py --router sigmoid --steps 400 --out runs/traces
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from liaoyuan.checkpoint import save_model
from liaoyuan.cli.progress import bar
from liaoyuan.data import Corpus, TokenBatches
from liaoyuan.data.corpus import CorpusConfig, prepare_corpus
from liaoyuan.data.records import read_lines
from liaoyuan.models import Decoder, ModelConfig, initialise, packed_context
from liaoyuan.models.config import Experts
from liaoyuan.training import TrainConfig, train

SHARED = Path(__file__).parents[2] / "shared" / "data"
DOMAINS = {
    "chinese": ("pretrain/zh/laws", "pretrain/zh/books_tech"),
    "english": ("pretrain/en/books", "pretrain/en/books_tech"),
    "code": ("pretrain/code/algorithms",),
    "maths": ("reason/math_train4500", "reason/gsm8k_train"),
}
MATHS = ("problem", "solution", "question", "answer")  # keys of problems, which have no text
BYTES = 3_000_000  # of each domain; every sixth document is kept for the trace
WINDOW, SEQUENCE = 2048, 512  # tokens


def main() -> None:
    options = parse()
    texts = write_texts(options.out / "text", Path(os.environ.get("LIAOYUAN_DATA", SHARED)))
    with bar("Data") as report:
        corpus = prepare_corpus(
            CorpusConfig(text=options.out / "text", vocab_size=8192), options.out / "corpus", report
        )
    model = initialise(Decoder(shape(options.router, corpus.tokenizer().vocab_size)), seed=0)
    settings = TrainConfig(steps=options.steps, batch_tokens=4096, balance_rate=0.003)
    batches = TokenBatches(corpus.stream("train"), 0, settings.batch_tokens, SEQUENCE)
    with bar("Train") as report:
        result = train(model, batches, settings, options.out / options.router, report)
    print(f"{model.config.num_parameters():,} weights, {result.tokens:,} tokens, last loss {result.loss:.3f}")
    save_model(model, options.out / f"{options.router}-model", options.out / "corpus" / "tokenizer")
    (options.out / "kept.json").write_text(json.dumps(texts), encoding="utf-8")
    counts = np.stack([trace(model, corpus, text, options.windows) for text in texts.values()])
    np.save(options.out / f"{options.router}.npy", counts)
    for name, rows in zip(texts, counts, strict=True):
        load = rows.sum(0)
        print(f"  {name}: fullest expert over the mean, by layer: {np.round(load.max(1) / load.mean(1), 2).tolist()}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", choices=("softmax", "sigmoid"), default="sigmoid")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--windows", type=int, default=48, help=f"of {WINDOW} tokens, for each domain")
    parser.add_argument("--out", type=Path, default=Path("runs/traces"))
    return parser.parse_args()


def shape(router: str, vocabulary: int) -> ModelConfig:
    experts = Experts(64, 4, 64, scoring=router)
    kind = {"softmax": "qwen3_moe", "sigmoid": "glm4_moe"}[router]
    return ModelConfig(kind, vocabulary, 128, 384, 4, 4, 2, 32, qk_norm=True, tie_word_embeddings=True, experts=experts)


def write_texts(folder: Path, data: Path) -> dict[str, str]:
    """Write the text to train on as files of `folder`; return what is kept for the trace, by domain."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {}
    for domain, names in DOMAINS.items():
        documents = [text for name in names for text in first_bytes(data / f"{name}.jsonl.zst", BYTES // len(names))]
        training = [text for place, text in enumerate(documents) if place % 6]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in training)
        target = folder / f"{domain}.jsonl"
        if not target.exists():  # a newer file would be another corpus
            target.write_text(lines, encoding="utf-8")
        kept[domain] = "\n\n".join(documents[::6])
    return kept


def first_bytes(path: Path, size: int) -> Iterator[str]:
    """Yield the texts of a file in pieces of up to 8,000 characters until `size` bytes are read."""
    for _, line in read_lines(path):
        row = json.loads(line)
        text = row.get("text") or "\n".join(str(row[key]) for key in MATHS if key in row)
        for start in range(0, len(text), 8000):
            piece = text[start : start + 8000]
            size -= len(piece.encode())
            if size < 0:
                return
            yield piece


@torch.inference_mode()
def trace(model: Decoder, corpus: Corpus, text: str, windows: int) -> np.ndarray:
    """Return how many tokens of each window chose each expert, int32 [windows, layers, experts]."""
    tokens = torch.tensor(corpus.tokenizer().encode(text)[: windows * WINDOW])
    model.eval()
    counts: list[np.ndarray] = []
    routers = [router for _, router in model.routers()]
    hooks = [
        router.register_forward_hook(lambda module, _, out: counts.append(count(module, out))) for router in routers
    ]
    positions, context = packed_context([SEQUENCE] * (WINDOW // SEQUENCE))
    for window in tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW):
        model(window, positions, context, rows=torch.tensor([0]))
    for hook in hooks:
        hook.remove()
    assert len(counts) == windows * len(routers), "the text is shorter than the windows asked for"
    return np.stack(counts).reshape(windows, len(routers), -1)


def count(router: torch.nn.Module, out: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return torch.bincount(out[1].flatten(), minlength=router.experts.num_experts).int().numpy()  # type: ignore[union-attr,arg-type]


if __name__ == "__main__":
    main()
