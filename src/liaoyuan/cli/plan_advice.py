"""`liaoyuan plan largest`, `buy` and `shapes`: what one can train with one's cards, what to buy, what suits them."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.plan_words import finite, read_span, short, told
from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan.advice import Outcome
    from liaoyuan.compute.plan.machine.suits import Suit
    from liaoyuan.compute.plan.span import Span

SHOWN = 5  # sizes of each kind
KINDS = {
    "hidden_size": "hidden size",
    "intermediate_size": "intermediate size",
    "head_dim": "head size (attention alone)",
    "expert": "width of an expert, by the rows that come to it",
}

ClusterName = Annotated[str, typer.Option(help="The machines: a name, such as h100, or a TOML file.")]
ProfileFile = Annotated[Path | None, typer.Option(help="What `plan calibrate` measured of such a card.")]
EffectiveShare = Annotated[
    str | None,
    typer.Option(metavar="S or LOW,MEDIAN,HIGH", help="Share of the time that counts (default: what failures leave)."),
]
Whole = Annotated[int, typer.Option(min=0, help="Layouts predicted as a whole in the end (0: formulas alone).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def largest(
    cluster: ClusterName = "h100",
    processes: Annotated[int, typer.Option(min=1, help="How many cards there are.")] = 8,
    days: Annotated[float, typer.Option(min=0.01, help="How long it may take.")] = 30.0,
    tokens_per_weight: Annotated[
        float, typer.Option(min=0.01, help="Tokens that the model sees for each weight.")
    ] = 20,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 4 * 2**20,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 8192,
    vocab: Annotated[int, typer.Option(min=1, help="Tokens known.")] = 128256,
    effective: EffectiveShare = None,
    profile: ProfileFile = None,
    whole: Whole = 4,
    json: AsJson = False,
) -> None:
    """Tell the largest model that these cards train in so many days, and its best layout."""
    from liaoyuan.checkpoint.training_state import CheckpointConfig
    from liaoyuan.cli.plan_job import machines_of
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.advice import Asker, Wish
    from liaoyuan.compute.plan.advice import largest as found_largest

    machines, figures = machines_of(cluster, profile)
    asker = Asker(machines, figures, CheckpointConfig(), _share(effective), whole)
    wish = Wish(days, tokens_per_weight, batch_tokens, sequence_length, vocab)
    with bar("Largest", quiet=json) as report:
        found = found_largest(asker, processes, wish, report)
    if json:
        print(json_format.dumps(finite(_values(found)), indent=2))
        return
    model = found.job.model
    print(
        f"{processes:,} x {machines.accelerator.name} train a dense model of {model.num_parameters() / 1e9:,.3g} "
        f"billion weights on {tokens_per_weight:g} tokens each in {days:g} days:\n"
        f"  hidden size {model.hidden_size:,}, {model.num_hidden_layers} layers, {model.num_attention_heads} heads of "
        f"{model.head_dim} ({model.num_key_value_heads} of keys and values), intermediate size "
        f"{model.intermediate_size:,}"
    )
    print(_outcome(found))
    print(_basis(found))


def buy(
    run_file: Annotated[Path | None, typer.Argument(help="TOML file, as `liaoyuan train` takes it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.steps=500000.")
    ] = None,
    days: Annotated[float, typer.Option(min=0.01, help="How long it may take.")] = 30.0,
    clusters: Annotated[str, typer.Option(help="Kinds of machines, with commas between.")] = "h100,h200,b200",
    tokens: Annotated[float | None, typer.Option(min=1, help="Seen in all (default: steps x batch_tokens).")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Tokens known, if there is no corpus yet.")] = None,
    effective: EffectiveShare = None,
    whole: Whole = 4,
    json: AsJson = False,
) -> None:
    """Tell for each kind of machine how many cards train this run in so many days: layout, energy and cost."""
    from liaoyuan.cli.plan_job import job_of, machines_of, run_config
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.advice import Asker, to_buy

    config, share = run_config(run_file, set_), _share(effective)
    kinds = {name: machines_of(name, None) for name in clusters.replace(" ", "").split(",")}
    found = dict[str, "Outcome | str"]()
    for name, (machines, figures) in kinds.items():
        job = job_of(config, machines.per_node, None, machines.accelerator.device, vocab)
        seen = tokens or float(job.train.steps * job.train.batch_tokens)
        asker = Asker(machines, figures, config.checkpoint, share, whole)
        try:
            with bar(name, quiet=json) as report:
                found[name] = to_buy(asker, job, days, seen, report)
        except LiaoyuanError as error:
            found[name] = str(error)
    if json:
        values = {name: {"refused": one} if isinstance(one, str) else _values(one) for name, one in found.items()}
        print(json_format.dumps(finite(values), indent=2))
        return
    print(f"{job.model.num_parameters():,} weights, {seen:,.4g} tokens, in {days:g} days:")
    for name, one in found.items():
        print(f"\n{name}: {one}" if isinstance(one, str) else f"\n{_cards(name, one)}\n{_outcome(one)}")
    if first := next((one for one in found.values() if not isinstance(one, str)), None):
        print(f"\n{_basis(first)}")


def shapes(
    cluster: ClusterName = "h100",
    hidden: Annotated[int, typer.Option(min=64, help="Hidden size that is thought of.")] = 4096,
    tokens: Annotated[int, typer.Option(min=1, help="Of a microbatch on a card.")] = 8192,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 4096,
    tp: Annotated[int, typer.Option(min=1, help="Processes that share each matrix.")] = 1,
    experts: Annotated[int, typer.Option(min=1, help="That one card holds.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = "bfloat16",
    profile: ProfileFile = None,
    json: AsJson = False,
) -> None:
    """Tell which hidden size, head size and shape of experts suit a card: what its products reach of their best."""
    from liaoyuan.cli.plan_job import machines_of
    from liaoyuan.compute.plan.machine.suits import suits

    machines, figures = machines_of(cluster, profile)
    found = suits(figures, hidden, tokens, sequence_length, tp, dtype, experts)
    if json:
        print(json_format.dumps({"card": figures.name, "suits": [asdict(one) for one in found]}, indent=2))
        return
    print(f"Of the rate of large products, what those of a layer reach on a {machines.accelerator.name}:")
    for kind, title in KINDS.items():
        print(f"\n{title}")
        of_kind = [one for one in found if one.what == kind]
        for one in _best_and_worst(of_kind) if kind != "expert" else _by_rows(of_kind):
            print(_suit_line(one))
    print(f"\nThese rest on {figures.rests_on}.")


def _best_and_worst(found: "list[Suit]") -> "list[Suit]":
    return found if len(found) <= 2 * SHOWN else [*found[:SHOWN], *found[-2:]]


def _by_rows(found: "list[Suit]") -> "list[Suit]":
    """Return the best width for each number of rows, and the worst for the most."""
    rows = sorted({one.rows for one in found})
    return [max((one for one in found if one.rows == count), key=lambda one: one.efficiency) for count in rows]


def _suit_line(one: "Suit") -> str:
    lost = ", ".join(f"{cause} {share:.1%}" for cause, share in one.lost.items() if share >= 0.001)
    rows = f" with {one.rows:,} rows" if one.what == "expert" else ""
    return f"  {one.value:>6,}{rows}: {one.efficiency:6.1%}" + (f"  (lost to {lost})" if lost else "")


def _share(effective: str | None) -> "Span | None":
    return read_span(effective, "--effective", most=1) if effective is not None else None


def _cards(name: str, one: "Outcome") -> str:
    cards, nodes = one.job.processes, one.job.processes // one.cluster.per_node
    return f"{name}: {cards:,} x {one.cluster.accelerator.name} ({nodes:,} nodes)"


def _outcome(one: "Outcome") -> str:
    choice, step = one.choice, one.choice.seconds
    saved = f", saved every {one.every:,} steps" if one.every else ""
    lines = [
        f"  layout: {choice.words}; {choice.memory_share(one.cluster):.0%} of the memory",
        f"  a step of {step:,.3g} s, {short(choice.tokens_per_second)} tokens/s a card, MFU "
        f"{choice.utilisation(one.peak):.1%}; {one.steps:,} steps",
        f"  {told(one.effective.times(100), '%')} of the time counts{saved}",
        f"  {told(one.days)} days, {told(one.card_hours)} card-hours",
    ]
    if energy := one.megawatt_hours:
        lines.append(f"  {told(energy)} MWh of the cards alone")
    lines.append(f"  cost {told(one.cost)}" if one.cost else "  no cost: the cluster has no price_per_hour")
    return "\n".join(lines)


def _basis(one: "Outcome") -> str:
    found = one.choice.found
    return (
        "Intervals hold 90% of what a step may take, and failures of the time. They rest on "
        f"{found.rests_on if found else 'formulas'}; {'failures' if one.every else 'the share'} as "
        f"{'the file of the cluster has them' if one.every else 'given'}."
    )


def _values(one: "Outcome") -> dict[str, Any]:
    model, choice = one.job.model, one.choice
    return {
        "weights": model.num_parameters(),
        "model": model.to_dict(),
        "processes": one.job.processes,
        "cluster": one.cluster.name,
        "layout": choice.job.layout.model_dump(mode="json"),
        "microbatches": one.job.train.microbatches,
        "step_seconds": asdict(choice.found.seconds) if choice.found else choice.seconds,
        "memory_share": choice.memory_share(one.cluster),
        "steps": one.steps,
        "effective": asdict(one.effective),
        "save_every": one.every,
        "days": asdict(one.days),
        "card_hours": asdict(one.card_hours),
        "megawatt_hours": asdict(one.megawatt_hours) if one.megawatt_hours else None,
        "cost": asdict(one.cost) if one.cost else None,
    }
