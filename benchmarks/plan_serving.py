"""Serving as planned beside serving as it is: the engine on this machine, workloads of different rates and lengths.

The engine's rates are from a short calibration, whose rounds lie between the workloads (the machine's speed drifts),
and from nothing that the workloads show. Requests come to a real engine and to a planned one at the same times. The
clock of the real one is that of CPU-seconds of its process, set forward to the next request when it is idle, so that a
busy machine disturbs little; one thread. Weights are drawn at random: what they say does not matter, as every answer
runs to its limit.

    python benchmarks/plan_serving.py --size small
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from liaoyuan.compute.plan import read_cluster
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.serving.asks import Ask, made_up
from liaoyuan.compute.plan.serving.engine_rates import EngineRates
from liaoyuan.compute.plan.serving.measured import fit, measure
from liaoyuan.compute.plan.serving.model_work import Served
from liaoyuan.compute.plan.serving.replica import Answer, Replica
from liaoyuan.compute.plan.serving.simulation import Outcome, serve, told
from liaoyuan.compute.plan.serving.step_price import StepPrice
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, config_from_dict, initialise

BATCHES = (1, 2, 4, 8, 16)  # of the calibration
SIZES = {"tiny": (64, 5, 512), "small": (256, 6, 4096), "middle": (512, 8, 8192)}  # hidden size, layers, vocabulary


@dataclass(frozen=True)
class Load:
    """load: requests a second as a multiple of what the engine could serve one by one, told by the plan; 0: all come at
    once.
    """

    name: str
    load: float
    prompt: float
    output: float
    count: int
    sequences: int = 64
    batch_tokens: int = 512
    cache_tokens: int = 16384

    @property
    def config(self) -> EngineConfig:
        sizes = {"max_batch_tokens": self.batch_tokens, "cache_tokens": self.cache_tokens}
        return EngineConfig(max_sequences=self.sequences, **sizes, decode_steps=1)  # a plan looks after each step


LOADS = (
    Load("one by one", 0.3, 64, 32, 24),
    Load("short, busy", 2.0, 32, 24, 48),
    Load("long prompts", 0.8, 400, 8, 24),
    Load("long prompts, small chunks", 0.8, 400, 8, 24, batch_tokens=64),
    Load("long answers", 3.0, 16, 120, 24),
    Load("all at once", 0.0, 64, 48, 48),
    Load("all at once, four at a time", 0.0, 64, 48, 24, sequences=4),
    Load("little memory", 0.0, 100, 60, 24, cache_tokens=1200),
    Load("overload", 8.0, 100, 40, 40),
    Load("chat", 1.5, 200, 60, 30),
)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    model = make(options.size)
    cluster = read_cluster("cpu")
    profile = assumed(cluster).median()
    served = Served(model.config)
    unknown = StepPrice(served, cluster, profile, EngineRates())
    rough, timed = measure(model, unknown, 1, batches=BATCHES)
    real = []
    for load in LOADS:
        asks = asked(StepPrice(served, cluster, profile, rough), load)
        real.append((load, asks, really(model, load.config, asks)))
        timed += measure(model, unknown, options.rounds, batches=BATCHES)[1]
        print(f"{load.name}: {len(asks)} requests served", flush=True)
    rates = fit(timed, unknown)
    print(f"{options.size}: {model.config.num_parameters():,} weights; {rates.rests_on}")
    print(", ".join(f"{name} {figure.median:.3g}" for name, figure in rates.figures().items()))
    price = StepPrice(served, cluster, profile, rates)
    rows = [compare(price, *one) for one in real]
    summary = summed(rows)
    print(json.dumps(summary, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"rates": rates.model_dump(), "rows": rows, "summary": summary}, indent=1))


def compare(price: StepPrice, load: Load, asks: list[Ask], real: Outcome) -> dict[str, object]:
    """Plan a workload that was served; return a row of the table, and print it."""
    most = max(ask.prompt_tokens + ask.output_tokens for ask in asks)
    planned = serve(asks, [Replica(price, load.config, load.cache_tokens // load.config.block_size, most)])
    row = {"load": load.name, "planned": figures(planned), "measured": figures(real)}
    cells = (f"{name} {row['planned'][name]:9.4g} {row['measured'][name]:9.4g}" for name in figures(real))  # type: ignore[index]
    print(f"{load.name:28} " + " | ".join(cells), flush=True)
    return row


def figures(outcome: Outcome) -> dict[str, float]:
    return {
        "tokens/s": outcome.throughput,
        "latency": outcome.whole.mean,
        "first": outcome.first_token.mean,
        "gap p50": outcome.between_tokens.p50,
        "steps": float(outcome.steps),
    }


def asked(price: StepPrice, load: Load) -> list[Ask]:
    """Return the requests: their rate in terms of how long one takes alone."""
    most = price.served.model.max_position_embeddings
    alone = price(np.array([int(load.prompt)]), np.array([int(load.prompt)]), 1)
    alone += load.output * price(np.array([1]), np.array([int(load.prompt + load.output / 2)]), 1)
    asks = made_up(load.load / alone if load.load else 1.0, load.prompt, load.output, load.count)
    return [
        Ask(
            ask.arrival if load.load else 0.0,
            min(ask.prompt_tokens, most // 2),
            min(ask.output_tokens, most // 2 - 1),
        )
        for ask in asks
    ]


def really(model: Decoder, config: EngineConfig, asks: list[Ask]) -> Outcome:
    """Serve the requests with an engine whose clock is that of its CPU-seconds."""
    engine, answers = Engine(model, config), [Answer(ask, number) for number, ask in enumerate(asks)]
    random = np.random.default_rng(1)
    vocabulary = model.config.vocab_size
    prompts = [tuple(random.integers(0, vocabulary, ask.prompt_tokens).tolist()) for ask in asks]
    warm_up(engine)
    pool = engine.pool
    gaps, last, coming = list[float](), dict[int, float](), 0
    skipped, begun, peak, count = 0.0, time.process_time(), 0, 0
    while coming < len(asks) or engine.has_work:
        now = time.process_time() - begun + skipped
        if not engine.has_work and asks[coming].arrival > now:
            skipped += asks[coming].arrival - now
            now = asks[coming].arrival
        while coming < len(asks) and asks[coming].arrival <= now:
            sampling = SamplingParams(max_tokens=asks[coming].output_tokens)
            engine.add(Request(coming, prompts[coming], sampling))
            coming += 1
        events = engine.step()
        now, count, peak = time.process_time() - begun + skipped, count + 1, max(peak, pool.size - pool.free)
        for event in events:
            answer = answers[int(event.id)]
            if answer.first == float("inf"):
                answer.first = now
            else:
                gaps.append(now - last[answer.number])
            last[answer.number] = answer.last = now
    stand_in = Replica(lambda *_: 0.0, config, pool.size, 1)
    stand_in.steps, stand_in.peak, stand_in.gaps, stand_in.busy = count, peak, [np.array(gaps)], now
    return told(answers, [stand_in])


def warm_up(engine: Engine) -> None:
    engine.generate([Request(-1 - number, (1, 2, 3), SamplingParams(max_tokens=4)) for number in range(3)])


def summed(rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Return by figure the rank order's correlation, the median error and the mean of signed ones."""
    found = {}
    for name in ("tokens/s", "latency", "first", "gap p50", "steps"):
        planned = np.array([row["planned"][name] for row in rows])  # type: ignore[index]
        real = np.array([row["measured"][name] for row in rows])  # type: ignore[index]
        errors = planned / real - 1
        found[name] = {
            "spearman": round(spearman(planned, real), 3),
            "median_error": round(float(np.median(np.abs(errors))), 4),
            "bias": round(float(np.mean(errors)), 4),
            "worst": round(float(np.abs(errors).max()), 4),
        }
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    ranks = [values.argsort().argsort() for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def make(size: str) -> Decoder:
    hidden, layers, vocabulary = SIZES[size]
    config = config_from_dict(
        {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": hidden * 8 // 3 // 32 * 32,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": max(1, hidden // 128),
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
    )
    return initialise(Decoder(config), seed=0).to(config.torch_dtype).eval()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=1, help="of the calibration after each workload")
    parser.add_argument("--out", type=Path, help="a JSON file of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
