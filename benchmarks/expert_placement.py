"""Expert placement beside DeepSeek's: how even the ranks' work is, and how many experts are sent to keep it so.

Every `--every` windows each method gets moving averages of the loads so far and may change the placement; what is
counted is the imbalance (busiest rank over the mean, mean over layers) of the windows that follow, which it has not
seen. Loads: routers' choices of a small mixture of experts on a mix of domains that drifts (`expert_traces.py` makes
them), and Zipf loads whose order drifts. The peer is the published algorithm of DeepSeek-AI 2024 (arXiv 2412.19437,
sec. 3.4; github.com/deepseek-ai/EPLB), written anew from its description: copies to whoever has the most load a copy,
then the longest first into the emptiest rank. It numbers ranks afresh each time, so beside its own moves stand those
that are left when its ranks are matched with the present ones (Hungarian method).

    python benchmarks/expert_placement.py --traces runs/traces --plot docs/images/expert-placement.png --json x.json
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from liaoyuan.inference.expert_placement import LoadAverage, apply, count_moves, imbalance, place, rebalance

Change = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (placement, load [averages, layers, experts]) -> placement


@dataclass(frozen=True)
class Method:
    """half_lives: of the averages of the loads that it gets, in windows; by_domain: for each domain apart."""

    change: Change
    half_lives: tuple[float, ...] = (2,)
    by_domain: bool = False


@dataclass(frozen=True)
class Case:
    """windows: from a seed to the counts by domain [domains, layers, experts] of one window after another."""

    name: str
    ranks: int
    slots: int
    windows: Callable[[int], Iterator[np.ndarray]]


def main() -> None:
    options = parse()
    cases = [*trace_cases(options.traces), *zipf_cases()]
    results = []
    for case in cases:
        rows = [
            measure(case, name, method, options)
            for name, method in METHODS.items()
            if "traces" in case.name or not method.by_domain
        ]
        print(table(case, rows), flush=True)
        results.append({"case": case.name, "ranks": case.ranks, "slots": case.slots, "rows": rows})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.plot:
        plot(results, options.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("runs/traces"), help="folder that expert_traces.py wrote")
    parser.add_argument("--windows", type=int, default=240)
    parser.add_argument("--every", type=int, default=8, help="windows between two changes of the placement")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def trace_cases(folder: Path) -> list[Case]:
    cases = []
    for path in sorted(folder.glob("*.npy")):
        counts = np.load(path)
        for ranks, slots in ((8, 10), (16, 5)):
            windows = lambda seed, counts=counts: mixed(counts, np.random.default_rng(seed))  # noqa: E731
            cases.append(Case(f"traces, {path.stem} router", ranks, slots, windows))
    return cases


def zipf_cases() -> list[Case]:
    sizes = ((256, 32, 9), (256, 144, 2), (64, 8, 10))
    return [
        Case(f"Zipf 0.8, {experts} experts", ranks, slots, lambda seed, experts=experts: zipf(seed, experts))
        for experts, ranks, slots in sizes
    ]


def mixed(counts: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Windows of a mix of domains: each domain's share rises and falls (period 96 windows), and jumps now and then."""
    domains = len(counts)
    phase, jump = np.arange(domains) / domains, np.ones(domains)
    for time_ in range(10**9):
        if time_ % 60 == 59:
            jump = random.exponential(size=domains)
        share = jump * np.exp(2 * np.cos(2 * np.pi * (time_ / 96 - phase)))
        drawn = random.integers(counts.shape[1], size=(8, domains))  # 8 windows of each domain: 16k tokens together
        yield (share / share.sum())[:, None, None] * counts[np.arange(domains), drawn].mean(0)


def zipf(seed: int, experts: int, layers: int = 4, exponent: float = 0.8) -> Iterator[np.ndarray]:
    """Zipf loads in an order of each layer's own that drifts: every window some neighbours of it change places."""
    random = np.random.default_rng(seed)
    order = np.stack([random.permutation(experts) for _ in range(layers)])
    load = (1 + np.arange(experts)) ** -exponent
    load /= load.sum()
    while True:
        for row in order:
            for place_ in random.integers(experts - 1, size=experts // 32):
                row[[place_, place_ + 1]] = row[[place_ + 1, place_]]
            if random.random() < 0.02:  # a burst: one expert becomes one of the busiest
                at = random.integers(experts)
                row[:] = np.insert(np.delete(row, at), random.integers(8), row[at])
        counts = np.stack([random.multinomial(16384 * 4, load) for _ in range(layers)])
        yield np.take_along_axis(counts, order.argsort(1), 1)[None].astype(float)


def keep(placement: np.ndarray, load: np.ndarray) -> np.ndarray:
    return placement


def ours(price: float) -> Change:
    return lambda placement, load: apply(placement, rebalance(placement, load, price))


def afresh(placement: np.ndarray, load: np.ndarray) -> np.ndarray:
    return place(load, *placement.shape[1:])


def published(placement: np.ndarray, load: np.ndarray) -> np.ndarray:
    """The peer: copies one at a time to the most load a copy, then greedy packing with equal counts."""
    ranks, slots = placement.shape[1:]
    layers = []
    for row in load.sum(0):
        owner, copies = list(range(len(row))), np.ones(len(row))
        while len(owner) < ranks * slots:
            busiest = int((row / copies).argmax())
            owner.append(busiest)
            copies[busiest] += 1
        work, held = np.zeros(ranks), [[] for _ in range(ranks)]  # type: tuple[np.ndarray, list[list[int]]]
        for expert in sorted(owner, key=lambda expert: -row[expert] / copies[expert]):
            rank = min((r for r in range(ranks) if len(held[r]) < slots), key=lambda r: work[r])
            held[rank].append(expert)
            work[rank] += row[expert] / copies[expert]
        layers.append(held)
    return np.array(layers, dtype=np.int32)


def matched(placement: np.ndarray, load: np.ndarray) -> np.ndarray:
    """The peer's placement with its ranks renumbered so that most experts are there already."""
    fresh = published(placement, load)
    for layer, (before, after) in enumerate(zip(placement, fresh, strict=True)):
        common = np.array([[len({*old.tolist()} & {*new.tolist()}) for new in after] for old in before])
        fresh[layer] = after[linear_sum_assignment(-common)[1]]
    return fresh


SPANS = (1, 4, 16)
METHODS: dict[str, Method] = {
    "never changed": Method(keep),
    "published, half-life 8": Method(published, (8,)),
    "published, half-life 2": Method(published),
    "published, half-life 2, ranks matched": Method(matched),
    "ours, half-life 2, afresh": Method(afresh),
    "ours, half-life 2, price 0": Method(ours(0.0)),
    "ours, half-life 2, price 0.003": Method(ours(0.003)),
    "ours, half-lives 1, 4, 16, price 0.001": Method(ours(0.001), SPANS),
    "ours, half-lives 1, 4, 16, price 0.003": Method(ours(0.003), SPANS),
    "ours, half-lives 1, 4, 16, price 0.01": Method(ours(0.01), SPANS),
    "ours, half-life 8 by domain, price 0.003": Method(ours(0.003), (8,), by_domain=True),
    "ours, half-lives 1, 4, 16 and domains, price 0.003": Method(ours(0.003), SPANS, by_domain=True),
}


def measure(case: Case, name: str, method: Method, options: argparse.Namespace) -> dict[str, object]:
    """Run one method over the windows of several seeds; the first placement is the published one for all."""
    uneven, moves, seconds = [], [], []
    for seed in range(options.seeds):
        windows, average = case.windows(seed), LoadAverage(*method.half_lives)
        first = [next(windows) for _ in range(options.every)]
        for counts in first:
            take_up(average, counts, method.by_domain)
        total = sum(counts.sum(0) for counts in first)
        placement = published(np.empty((len(total), case.ranks, case.slots)), total[None])
        for step in range(options.windows):
            counts = next(windows)
            uneven.append(float(imbalance(placement, counts.sum(0)).mean()))
            take_up(average, counts, method.by_domain)
            if step % options.every == options.every - 1:
                begin, before = time.perf_counter(), placement
                placement = method.change(before, average.load())
                seconds.append(time.perf_counter() - begin)
                moves.append(count_moves(before, placement) / len(placement))
    return {
        "method": name,
        "imbalance": float(np.mean(uneven)),
        "p99": float(np.quantile(uneven, 0.99)),
        "moves": float(np.mean(moves)),
        "milliseconds": 1e3 * float(np.mean(seconds)) / len(placement),
    }


def take_up(average: LoadAverage, counts: np.ndarray, by_domain: bool) -> None:
    for domain, part in enumerate(counts if by_domain else counts.sum(0)[None]):
        average.add(part, str(domain))


def table(case: Case, rows: list[dict[str, object]]) -> str:
    lines = [
        f"\n{case.name}: {case.ranks} ranks of {case.slots} slots\n",
        "| method | imbalance | 99% of windows below | moves a layer and change | ms a layer |",
        "|---|---|---|---|---|",
    ]
    form = "| {method} | {imbalance:.3f} | {p99:.3f} | {moves:.1f} | {milliseconds:.1f} |"
    return "\n".join([*lines, *(form.format(**row) for row in rows)])


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = -(-(len(results) + 1) // 2)  # one panel is for the legend
    figure, axes = pyplot.subplots(2, columns, figsize=(4 * columns, 7))
    for axis, result in zip(axes.flat, results, strict=False):
        for row in result["rows"]:
            mark = "s" if row["method"].startswith("published") else "o" if row["method"].startswith("ours") else "x"
            axis.plot(row["moves"], row["imbalance"] - 1, mark, label=row["method"])
        axis.set_title(f"{result['case']}\n{result['ranks']} ranks of {result['slots']} slots", fontsize=9)
        axis.set_xlabel("moves a layer and change")
        axis.set_ylabel("busiest rank over the mean, less 1")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_yscale("log")
        axis.set_xlim(left=-0.1)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
