"""How even the work of several processes is that share a model's experts, while it is served and the text changes.

The model is the small mixture of experts that `expert_traces.py` trains. Requests continue pieces of text that it has
not seen, one domain after the other, on real processes of this machine; for each number of further slots the experts
stay, and then are moved as `liaoyuan serve --rebalance-every` moves them. Told is the imbalance: rows of the busiest
process over those of the mean one, added up over the steps of a round, on the mean of the layers. All answers must be
the same, to the last bit.

    python benchmarks/expert_traces.py --router softmax --steps 200 --windows 24 --out runs/traces
    python benchmarks/live_experts.py --traces runs/traces --plot docs/images/live-experts.png
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.spread.balance import Balancing
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.inference.spread.ranks import open_ranks
from liaoyuan.models import Decoder
from liaoyuan.parallel import Layout

PATIENCE = timedelta(minutes=10)  # a machine that does much else


def main() -> None:
    options = parse()
    folder = options.traces / f"{options.router}-model-of-{options.ranks}"
    spread_heads(options.traces / f"{options.router}-model", folder, options.ranks)
    rounds = requests_of(options.traces, Tokenizer.load(folder), options)
    results, answers = [], None
    for copies in options.copies:
        for seconds in (None, options.seconds):
            way, found = measure(folder, Balancing(copies, seconds), rounds, options.ranks)
            assert answers is None or found == answers, "an answer has changed"
            answers = found
            results.append(way)
            print(line(way), flush=True)
    print(f"{len(results)} ways, {sum(len(each) for _, each in rounds)} answers each: all the same to the last bit")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.plot:
        plot(results, [domain for domain, _ in rounds], options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("runs/traces"), help="folder that expert_traces.py wrote")
    parser.add_argument("--router", choices=("softmax", "sigmoid"), default="softmax")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--copies", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--seconds", type=float, default=1.0, help="between two looks at the loads")
    parser.add_argument("--rounds", type=int, default=3, help="of each domain")
    parser.add_argument("--requests", type=int, default=32, help="of a round")
    parser.add_argument("--prompt", type=int, default=96, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="generated for each request")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def spread_heads(source: Path, target: Path, ranks: int) -> None:
    """Write the same model with a copy of its keys and values for each process, so that so many can share the heads."""
    if target.exists():
        return
    model = load_model(source)
    config, times = model.config, ranks // model.config.num_key_value_heads
    if times > 1:
        state = {name: repeat_heads(name, x, model, times) for name, x in model.state_dict().items()}
        model = Decoder(replace(config, num_key_value_heads=ranks))
        model.load_state_dict(state)
    save_model(model, target, source)


def repeat_heads(name: str, weight: torch.Tensor, model: Decoder, times: int) -> torch.Tensor:
    """Deal out the query heads of each key-value head among `times` copies of it."""
    if not name.endswith("qkv_proj.weight"):
        return weight
    config = model.config
    groups = weight.view(config.num_key_value_heads, -1, config.head_dim, weight.shape[1])
    queries, own = groups[:, :-2], groups[:, -2:]
    queries = queries.reshape(len(queries) * times, -1, *queries.shape[2:])
    return torch.cat([queries, own.repeat_interleave(times, 0)], 1).reshape(-1, weight.shape[1])


def requests_of(folder: Path, tokenizer: Tokenizer, options: argparse.Namespace) -> list[tuple[str, list[Request]]]:
    """Return the domain and the requests of each round."""
    texts, found = json.loads((folder / "kept.json").read_text(encoding="utf-8")), []
    for domain, text in texts.items():
        tokens = tokenizer.encode(text[: options.rounds * options.requests * options.prompt * 8])
        for number in range(options.rounds):
            first = number * options.requests
            places = [(first + at) * options.prompt for at in range(options.requests)]
            prompts = [tuple(tokens[at : at + options.prompt]) for at in places]
            rules = SamplingParams(options.tokens, seed=number)
            found.append((domain, [Request(at, prompt, rules) for at, prompt in enumerate(prompts)]))
    return found


def measure(
    folder: Path, balancing: Balancing, rounds: list[tuple[str, list[Request]]], ranks: int
) -> tuple[dict[str, Any], list[Any]]:
    """Return the imbalance of each round and what was moved, and all answers."""
    layout = Layout(tp=ranks, ep=ranks, fsdp=1)
    with open_ranks(folder, layout, "cpu", print, PATIENCE, balancing=balancing) as leader:
        engine = Engine(leader.model, EngineConfig(max_sequences=32, max_batch_tokens=512), memory=leader)
        imbalances, moves, answers = [], [], []
        for _, requests in rounds:
            read = counter(leader)
            answers += [(one.tokens, one.logprobs) for one in engine.generate(requests)]
            imbalances.append(read())
            moves.append(engine.statistics()["expert_moves"])
        said = engine.statistics()
    return {
        "copies": balancing.copies,
        "moved": balancing.seconds is not None,
        "imbalance": imbalances,
        "moves": np.diff(moves, prepend=0).tolist(),
        "looks": said["expert_looks"],
        "copies_bytes": said["expert_copies_bytes"],
    }, answers


def counter(leader: Leader) -> Callable[[], float]:
    """Return a function that says how uneven the steps since were."""
    placed = leader.placed
    assert placed is not None
    busiest, total = placed.busiest.copy(), placed.total.copy()
    return lambda: float((placed.ranks * (placed.busiest - busiest) / (placed.total - total)).mean())


def line(way: dict[str, Any]) -> str:
    how = f"moved ({way['looks']} looks, {sum(way['moves'])} experts sent)" if way["moved"] else "stay"
    rounds = " ".join(f"{x:.2f}" for x in way["imbalance"])
    return f"{way['copies']} further slots, experts {how}: mean {np.mean(way['imbalance']):.3f}; rounds {rounds}"


def plot(results: list[dict[str, Any]], domains: list[str], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4))
    for way in results:
        if way["moved"] or way["copies"] == 0:
            name = f"moved, {way['copies']} further slots" if way["moved"] else "experts stay"
            axis.plot(way["imbalance"], "o-" if way["moved"] else "x--", label=name)
    for place in range(options.rounds, len(domains), options.rounds):
        axis.axvline(place - 0.5, color="grey", linewidth=0.5)
    axis.set_xticks(
        range(len(domains)), [domain if n % options.rounds == 0 else "" for n, domain in enumerate(domains)]
    )
    axis.set_ylabel("busiest process over the mean")
    axis.set_ylim(bottom=1)
    axis.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=100)


if __name__ == "__main__":
    main()
