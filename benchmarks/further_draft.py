"""What a layer for the token after the next brings as a draft: steps, right guesses, tokens a second, beside n-grams.

No small model with such a layer is published, so one is trained here for `--model` alone: on texts that this model
draws itself, by the loss of DeepSeek-AI 2024 (arXiv 2412.19437, eq. 24), the model frozen. Then other beginnings of its
texts are continued, one request at a time, greedily and drawn. The untrained layer is the control. All ways take turns
in one run; medians.

    python benchmarks/further_draft.py --model FOLDER
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import torch  # noqa: E402  (after the allocator's settings)
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from liaoyuan.checkpoint import load_model  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams  # noqa: E402
from liaoyuan.models import Decoder, initialise, packed_context  # noqa: E402

LENGTH, BEGINNING, BATCH = 200, 12, 8  # tokens of a text, of a prompt; texts of a training step


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    base = load_model(options.model)
    untrained, model = with_layer(base), with_layer(base)
    texts = draw(base, options.texts + options.prompts)
    train(model, texts[: options.texts], options.steps)
    prompts = [tuple(text[:BEGINNING].tolist()) for text in texts[options.texts :]]
    what = f"{len(prompts)} requests of {LENGTH - BEGINNING} tokens, one at a time"
    print(f"{cpu_name()}, {options.threads} threads; {what}")
    rows = [row for heat in (0.0, 1.0) for row in compare(model, untrained, prompts, heat, options)]
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder")
    parser.add_argument("--texts", type=int, default=400, help="to train the layer on")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--guesses", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="a file for the rows")
    return parser.parse_args()


def with_layer(base: Decoder) -> Decoder:
    """Return a copy of the model with a fresh layer for the token after the next."""
    model = initialise(Decoder(replace(base.config, further_layers=1)), 0)
    model.load_state_dict(base.state_dict(), strict=False)
    return model.eval()


def draw(model: Decoder, count: int) -> list[Tensor]:
    """Return texts that the model draws from nothing but its first token, int64 [LENGTH] each."""
    sampling = SamplingParams(max_tokens=LENGTH - 1)
    begin = (model.config.bos_token_id or 0,)
    wanted = [Request(index, begin, replace(sampling, seed=index)) for index in range(count)]
    return [torch.tensor((*begin, *one.tokens)) for one in Engine(model).generate(wanted)]


def train(model: Decoder, texts: list[Tensor], steps: int) -> None:
    """Teach the further layer alone to predict the token after the next."""
    weights = list(model.further.parameters())
    optimiser = torch.optim.Adam(weights, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        some = [texts[(step * BATCH + n) % len(texts)] for n in range(BATCH)]
        loss = loss_of(model, some)
        optimiser.zero_grad()
        loss.backward(inputs=weights)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats", flush=True)


def loss_of(model: Decoder, texts: list[Tensor]) -> Tensor:
    positions, context = packed_context([len(text) - 2 for text in texts])
    now, following, target = (torch.cat([text[n : len(text) - 2 + n] for text in texts]) for n in range(3))
    with torch.no_grad():
        residual, x = model.run_layers(model.embed_tokens(now), positions, context)
    further = model.further[0](residual + x, model.embed_tokens(following), model.angles(positions), context)
    return functional.cross_entropy(model.logits(model.further[0].norm(further)), target)


def compare(
    model: Decoder, untrained: Decoder, prompts: list[tuple[int, ...]], heat: float, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Print and return a row for each way, and check that all give the same tokens."""
    sampling = SamplingParams(max_tokens=LENGTH - BEGINNING, temperature=heat)
    wanted = [Request(index, prompt, replace(sampling, seed=index)) for index, prompt in enumerate(prompts)]
    ways = {"without": (model, ""), "n-grams": (model, "ngram"), "untrained": (untrained, "mtp"), "mtp": (model, "mtp")}
    sizes = EngineConfig(max_sequences=1, speculate_tokens=options.guesses)
    engines = {name: Engine(one, sizes.model_copy(update={"speculate": how})) for name, (one, how) in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = []
    for _ in range(options.rounds):
        for name, engine in engines.items():
            before = time.perf_counter()
            answers.append([one.tokens for one in engine.generate(wanted)])
            seconds[name].append(time.perf_counter() - before)
    assert all(one == answers[0] for one in answers)
    tokens = sum(map(len, answers[0]))
    rows: list[dict[str, object]] = []
    print(f"temperature {heat}\n{'':10} {'steps':>6} {'tokens a step':>13} {'guessed':>8} {'right':>6} {'tokens/s':>9}")
    for name, engine in engines.items():
        counts = {key: value // options.rounds for key, value in engine.statistics().items() if isinstance(value, int)}
        steps, guessed, right = (counts[key] for key in ("steps", "guessed_tokens", "guessed_right"))
        rate, share = tokens / statistics.median(seconds[name]), f"{right / guessed:.0%}" if guessed else ""
        print(f"{name:10} {steps:6} {tokens / steps:13.2f} {guessed:8} {share:>6} {rate:9.0f}", flush=True)
        rows.append(
            {"way": name, "temperature": heat, "steps": steps, "guessed": guessed, "right": right, "rate": rate}
        )
    return rows


if __name__ == "__main__":
    main()
