"""`liaoyuan plan serve` and `plan serve-rates`: what a trace of requests takes, and how to find what cards do."""

import json as json_format
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liaoyuan.cli.plan_words import causes
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan.serving import Ask, Machines, Outcome, Planned, Served, Spread, Way
    from liaoyuan.inference import EngineConfig

Model = Annotated[Path, typer.Argument(help="Folder of the model; its config.json is enough.")]
COPIES = (0, 1, 2, 4)  # further slots for experts that are tried
DECODING, READ = 64, 2048  # sequences and tokens of the steps that show what it is worth


def serve(
    model: Model,
    cluster: Annotated[str, typer.Option(help="What it would run on: a name, such as h100, or a TOML file.")] = "h100",
    processes: Annotated[int, typer.Option(min=1, help="How many processes (cards) serve.")] = 1,
    trace: Annotated[Path | None, typer.Option(help="Requests, a JSON line each (see docs/plan-jobs.md).")] = None,
    rate: Annotated[float, typer.Option(help="Else made-up ones: so many a second,")] = 1.0,
    prompt: Annotated[float, typer.Option(min=1, help="with so many tokens of a prompt on the mean,")] = 512.0,
    output: Annotated[float, typer.Option(min=1, help="and of an answer,")] = 256.0,
    spread: Annotated[float, typer.Option(min=0, help="deviation of the logarithms of both,")] = 0.6,
    count: Annotated[int, typer.Option(min=1, help="and so many requests.")] = 400,
    hurry: Annotated[float, typer.Option(help="Let the trace come so many times as fast.")] = 1.0,
    tp: Annotated[int | None, typer.Option(min=1, help="Processes of a replica (default: all are tried).")] = None,
    ep: Annotated[int, typer.Option(min=1, help="Processes of a replica that share the experts, with --tp.")] = 1,
    prefill: Annotated[int, typer.Option(min=0, help="Replicas for prompts alone, with --tp.")] = 0,
    apart: Annotated[bool, typer.Option("--apart", help="Try every ratio of prefill to decode, too.")] = False,
    quantise: Annotated[str | None, typer.Option(metavar="KIND", help="Weights in int8, int4 or fp8.")] = None,
    cache_gb: Annotated[float | None, typer.Option(help="Of keys and values (default: what the card leaves).")] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 2048,
    routers: Annotated[Path | None, typer.Option(help="A trace of experts' choices; says where they lie best.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Of the card, as `plan calibrate` writes it.")] = None,
    rates: Annotated[Path | None, typer.Option(help="Of the engine, as `plan serve-rates` writes them.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Serve requests that do not come, on cards that need not be there: seconds to the first token, and so on."""
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.serving import Served, plan_way, plan_ways, ways
    from liaoyuan.inference import EngineConfig
    from liaoyuan.models import read_config

    if rate <= 0 or hurry <= 0:
        raise LiaoyuanError("--rate and --hurry are requests a second and how many times as fast: more than 0.")
    shape, on = read_config(model), machines(cluster, profile, rates)
    asks = _asks(trace, rate, prompt, output, count, spread, hurry)
    served = Served(shape, bits=quantise)
    config = EngineConfig(max_sequences=max_sequences, max_batch_tokens=max(max_batch_tokens, max_sequences))
    cache = cache_gb * 1e9 if cache_gb is not None else None
    spreads = _spreads(routers, served, tp or processes) if routers else []
    with bar("Plan", quiet=json) as report:
        if tp is None:
            found = plan_ways(asks, served, ways(served, processes, apart), on, config, cache, report)
        else:
            chosen = _way(processes, tp, ep, prefill)
            found = [plan_way(asks, served, chosen, on, config, cache)]
    if json:
        values = {"ways": [asdict(one) for one in found], "experts": [asdict(one) for one in spreads]}
        print(json_format.dumps(values, indent=2))
        return
    print(_headline(shape.num_parameters(), asks, on, processes))
    print(_table(found))
    if found[0].median:
        print(_best(found[0], found[0].median, config, on))
    if spreads:
        print(_told_spreads(spreads, served, found[0].way, on))


def serve_rates(
    model: Model,
    out: Annotated[Path, typer.Option(help="File of the rates.")] = Path("rates.json"),
    profile: Annotated[Path | None, typer.Option(help="Of the card, as `plan calibrate` writes it.")] = None,
    cluster: Annotated[str, typer.Option(help="What this machine is.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="How often every kind of step is timed.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time steps of an engine here, in a minute or so, and write what `plan serve --rates` takes."""
    import time

    from liaoyuan.checkpoint import load_model
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.serving import EngineRates, Served, StepPrice, measure
    from liaoyuan.device import select_device

    place = select_device(device)
    on = machines(cluster, profile, None)
    loaded = load_model(model, device=place.torch)
    price = StepPrice(Served(loaded.config), on.cluster, on.certain.profile, EngineRates())
    clock = time.process_time if place.is_cpu else time.perf_counter
    with bar("Rates", quiet=json) as report:
        found, timed = measure(loaded, price, rounds, clock, report=report)
    found.save(out)
    if json:
        print(found.model_dump_json(indent=2))
        return
    print(f"{len(timed)} steps timed; {found.rests_on}.")
    for name, figure in found.figures().items():
        print(f"  {name:20} {figure.median:10.3g}")
    print(f"The rates are in {out}.")


def machines(cluster: str, profile: Path | None, rates: Path | None) -> "Machines":
    """Return what is planned for: measured where files say so, else assumed."""
    from liaoyuan.cli.plan_job import machines_of
    from liaoyuan.compute.plan.serving import EngineRates, Machines, read_rates

    return Machines(*machines_of(cluster, profile), read_rates(rates) if rates else EngineRates())


def _asks(
    trace: Path | None, rate: float, prompt: float, output: float, count: int, spread: float, hurry: float
) -> "list[Ask]":
    from liaoyuan.compute.plan.serving import hurried, made_up, read_asks

    return hurried(read_asks(trace) if trace else made_up(rate, prompt, output, count, spread), hurry)


def _way(processes: int, tp: int, ep: int, prefill: int) -> "Way":
    from liaoyuan.compute.plan.serving import Way

    if processes % tp:
        raise LiaoyuanError(f"{processes} processes are no whole number of replicas of {tp}.")
    if prefill and (tp > 1 or prefill >= processes):
        raise LiaoyuanError(
            "--prefill is how many of the processes compute prompts alone: at least one must be left, and each is a "
            "replica of its own (--tp 1)."
        )
    return Way(processes // tp, tp, ep, prefill)


def _spreads(routers: Path, served: "Served", ranks: int) -> "list[Spread]":
    from liaoyuan.compute.plan.serving import read_counts, spreads

    experts, counts = served.model.experts, read_counts(routers)
    if experts is None:
        raise LiaoyuanError("--routers is a trace of experts' choices, and this model has no experts: leave it out.")
    if counts.shape[2] != experts.num_experts:
        raise LiaoyuanError(f"{routers} is of {counts.shape[2]} experts, and the model has {experts.num_experts}.")
    if ranks == 1:
        raise LiaoyuanError("With one process no expert lies elsewhere: give --processes, or --tp.")
    return spreads(counts, ranks, [each for each in COPIES if each <= counts.shape[2] - counts.shape[2] // ranks])


def _headline(weights: int, asks: "list[Ask]", on: "Machines", processes: int) -> str:
    span = max(ask.arrival for ask in asks)
    came = f"in {span:,.1f} s" if span else "all at once"
    return (
        f"{weights:,} weights on {processes} x {on.cluster.accelerator.name}; {len(asks):,} requests {came}, "
        f"{sum(ask.prompt_tokens for ask in asks):,} tokens of prompts, "
        f"{sum(ask.output_tokens for ask in asks):,} of answers"
    )


def _table(found: "list[Planned]") -> str:
    lines = [
        f"{'':28}{'first token':>18}{'between tokens':>18}{'last token':>18}{'tokens/s':>10}{'busy':>6}{'cache':>7}",
        f"{'':28}" + f"{'p50 / p99, ms':>18}" * 2 + f"{'mean / p99, s':>18}",
    ]
    for one in found:
        if (seen := one.median) is None:
            lines.append(f"{one.way.describe():28}does not fit: {one.why_not}")
            continue
        lines.append(
            f"{one.way.describe():28}"
            f"{1e3 * seen.first_token.p50:9,.0f} /{1e3 * seen.first_token.p99:7,.0f}"
            f"{1e3 * seen.between_tokens.p50:9,.1f} /{1e3 * seen.between_tokens.p99:7,.1f}"
            f"{seen.whole.mean:9,.2f} /{seen.whole.p99:7,.2f}"
            f"{seen.throughput:10,.0f}{seen.busy:6.0%}{seen.peak_blocks / seen.blocks:7.1%}"
        )
    return "\n".join(lines)


def _best(one: "Planned", seen: "Outcome", config: "EngineConfig", on: "Machines") -> str:
    lines = [f"\n{one.way.describe()}:"]
    if one.fast and one.slow:
        names = {
            "first_token": "first token, mean",
            "between_tokens": "between tokens, mean",
            "whole": "last token, mean",
        }
        for key, name in names.items():
            low, middle, high = (getattr(each, key).mean for each in (one.fast, seen, one.slow))
            lines.append(f"  {name:22}{1e3 * middle:10,.1f} ms ({1e3 * low:,.1f} to {1e3 * high:,.1f})")
        lines.append(
            f"  Steps may take {1 - one.factor.low:.0%} less to {one.factor.high - 1:.0%} more. {causes(one.width)}."
        )
    lines.append(
        f"  Cache: at most {seen.peak_blocks:,} of {seen.blocks:,} blocks of {config.block_size} tokens a replica were "
        f"held; {seen.preemptions:,} times a request gave way; {seen.refused:,} could never fit."
    )
    if seen.cached_tokens:
        lines.append(f"  {seen.cached_tokens / seen.prompt_tokens:.0%} of the prompts' tokens were known.")
    lines.append(f"  Rests on {on.profile.rests_on}; {on.rates.rests_on}.")
    return "\n".join(lines)


def _told_spreads(spreads: "list[Spread]", served: "Served", way: "Way", on: "Machines") -> str:
    """Return what placements of experts give, and what steps take with each."""
    import numpy as np

    from liaoyuan.compute.plan.serving import StepPrice

    ranks = spreads[0].ranks
    lines = [
        f"\nExperts over {ranks} processes: rows of the busiest over the mean, and steps in which {DECODING} decode, "
        f"or {READ:,} tokens of a prompt are read:"
    ]
    decode = np.ones(DECODING, dtype=np.int64), np.full(DECODING, 1024), DECODING
    prefill = np.array([READ]), np.array([READ]), 1
    for one in spreads:
        part = replace(served, tp=ranks, ep=ranks, shares=one.shares, copies=one.copies)
        price = StepPrice(part, on.cluster, on.certain.profile, on.rates)
        what = f"moved, {one.copies} further slots" if one.moved else "stay in their order"
        lines.append(
            f"  {what:24} imbalance {one.imbalance:.3f} (worst window {one.worst:.3f}), {one.moves:,} sent, "
            f"{1e3 * price(*decode):.2f} and {1e3 * price(*prefill):.2f} ms"
        )
    return "\n".join(lines)
