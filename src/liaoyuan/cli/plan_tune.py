"""`liaoyuan plan tune`, and `plan RUN.toml` where that is a run file of `liaoyuan tune`: memory and hours."""

import json as json_format
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from liaoyuan.cli.groups import DefaultCommand
from liaoyuan.cli.plan_words import causes, size, told
from liaoyuan.errors import LiaoyuanError, nearest

if TYPE_CHECKING:
    from liaoyuan.compute.plan.serving import Machines
    from liaoyuan.compute.plan.tuning import LearnPlan, Records, RlPlan
    from liaoyuan.models import ModelConfig

Verb = Literal["sft", "preference", "rl"]
VERBS: dict[str, Verb] = {"sft": "sft", "dpo": "preference", "reward": "preference", "rl": "rl", "distill": "rl"}
OF_RL = ("rl", "task", "teacher", "validation_problems", "test_problems", "test_samples")
OF_PREFERENCE = ("preference", "held_out", "held_out_share", "control", "ask", "skip_long")
OF_PRETRAINING = ("corpus",)
SHOWN = 5  # parts of the memory at the peak


class PlanCommand(DefaultCommand):
    """A group in which a run file of `liaoyuan tune` means the command for such files."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and (file := _run_file(args)) and _is_tuning(file):
            args = ["tune", *args]
        return super().parse_args(ctx, args)


def tune(
    run_file: Annotated[Path, typer.Argument(help="TOML file, as `liaoyuan tune` takes it.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    verb: Annotated[str | None, typer.Option(help="sft, dpo, reward, rl or distill, if the keys do not say.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many processes (cards) it would run on.")] = 1,
    cluster: Annotated[str, typer.Option(help="What it would run on: a name, such as h100, or a TOML file.")] = "h100",
    records: Annotated[int | None, typer.Option(min=1, help="How many, if the data are not there yet.")] = None,
    mean_tokens: Annotated[float, typer.Option(min=2, help="Of a record, then.")] = 500.0,
    prompt: Annotated[float, typer.Option(min=1, help="RL: tokens of a question, on the mean.")] = 200.0,
    answer: Annotated[float | None, typer.Option(min=1, help="RL: of an answer (default: half of the most).")] = None,
    tail: Annotated[float, typer.Option(min=0, help="RL: deviation of the logarithm of its length.")] = 0.6,
    signal: Annotated[float, typer.Option(min=0, max=1, help="RL: share of groups that teach something.")] = 0.7,
    reward_model: Annotated[Path | None, typer.Option(help="RL: a model that reads every answer.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Of the card, as `plan calibrate` writes it.")] = None,
    rates: Annotated[Path | None, typer.Option(help="RL: of the engine, as `plan serve-rates` writes them.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what customising a model holds and takes, before it runs: fine-tuning, preferences, RL, distillation."""
    from liaoyuan.cli.plan_serve import machines

    kind, on = _kind(run_file, verb), machines(cluster, profile, rates)
    if kind == "rl":
        lengths = {"prompt": prompt, "answer": answer, "tail": tail, "signal": signal}
        _plan_rl(run_file, set_, on, processes, lengths, reward_model, json)
    else:
        _plan_learning(run_file, set_, kind, on, processes, records, mean_tokens, json)


def _plan_learning(
    run_file: Path,
    set_: list[str] | None,
    kind: Verb,
    on: "Machines",
    processes: int,
    count: int | None,
    mean_tokens: float,
    json: bool,
) -> None:
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan import Job
    from liaoyuan.compute.plan.tuning import Records, TuneJob, plan_learning, steps_of
    from liaoyuan.models import read_config
    from liaoyuan.rundir import Progress
    from liaoyuan.tuning.lora import refuse_layout

    config = _config(kind, run_file, set_)
    shape = read_config(config.model)
    seen = (
        Records(count, round(count * mean_tokens), min(400, count // 20) * round(mean_tokens))
        if count
        else _read_records(kind, config)
    )
    train = config.train
    if not train.steps:
        train = train.model_copy(update={"steps": steps_of(seen, config.epochs, train.batch_tokens)})
    job = Job(shape, config.layout, processes, config.sequence_length, train, on.cluster.accelerator.device)
    if config.start.has_adapters:
        refuse_layout(job.resolved, config.lora, processes)
    loss = config.preference if kind == "preference" else None
    with bar("Plan", quiet=json) as report:
        found = plan_learning(
            TuneJob(job, min(seen.mean, config.sequence_length), config.method, config.lora, loss),
            seen,
            on.cluster,
            on.profile,
        )
        report(Progress(1, 1, "step", "a step has run dry"))
    if json:
        print(json_format.dumps(asdict(found), indent=2))
        return
    what = "preferences" if loss else "fine-tuning"
    print(
        f"{what.capitalize()} ({config.method}): {shape.num_parameters():,} weights, {found.trained:,} trained, on "
        f"{processes:,} x {on.cluster.accelerator.name}; {seen.count:,} records of {seen.mean:,} tokens on the mean"
    )
    print(_learning(found, on, train.batch_tokens))


def _learning(found: "LearnPlan", on: "Machines", batch_tokens: int) -> str:
    room = on.cluster.accelerator.usable_bytes
    fits = "fits in" if found.peak <= room else "does NOT fit in"
    lines = [
        f"{found.steps:,} steps of {batch_tokens:,} tokens, each {told(found.seconds, ' s')}: "
        f"{told(found.hours, ' hours')}",
        f"A process: peak {size(found.peak)}, of which {size(found.lasting)} between steps; it {fits} a "
        f"{on.cluster.accelerator.name}: {found.peak / room:.0%} of the {size(room)} that tensors may take",
    ]
    for part in found.held[:SHOWN]:
        lines.append(f"  {size(part.bytes):>12}  {part.module or 'the model'}: {part.operator} ({part.phase})")
    lines.append(f"{causes(found.width)}. It rests on {found.rests_on}.")
    return "\n".join(lines)


def _plan_rl(
    run_file: Path,
    set_: list[str] | None,
    on: "Machines",
    cards: int,
    lengths: dict[str, Any],
    reward_model: Path | None,
    json: bool,
) -> None:
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.plan.tuning import RlJob, RlPlanner
    from liaoyuan.models import read_config

    config = _config("rl", run_file, set_)
    shape, rl = read_config(config.model), config.rl
    split_weighs = rl.importance == "on" or (rl.importance == "auto" and not config.exact)
    job = RlJob(
        shape,
        rl,
        lengths["prompt"],
        min(lengths["answer"] or rl.max_tokens / 2, rl.max_tokens),
        lengths["tail"],
        lengths["signal"],
        split_weighs,
        _trained(config, shape),
        read_config(config.teacher) if config.teacher else None,
        read_config(reward_model) if reward_model else None,
    )
    with bar("Plan", quiet=json) as report:
        found = RlPlanner(job, on).search(cards, report)
    if json:
        print(json_format.dumps([asdict(one) for one in found], indent=2))
        return
    what = f"{'Distillation' if config.teacher else 'RL'} ({rl.advantage}, {config.method})"
    mean = sum(job.lengths) / len(job.lengths)
    print(
        f"{what}: {shape.num_parameters():,} weights on {cards} x {on.cluster.accelerator.name}; {rl.steps:,} steps of "
        f"{rl.problems} problems x {rl.group} answers, {mean:,.0f} tokens on the mean, {max(job.lengths):,} at most"
    )
    print(_table(found))
    if (best := found[0]).hours and best.seconds:
        print(
            f"\n{best.split.describe()}: {told(best.hours, ' hours')}; "
            f"{best.tokens_per_second:,.0f} tokens of answers a second.\n{causes(best.width)}. "
            f"It rests on {on.profile.rests_on}; {on.rates.rests_on}."
        )


def _table(found: "list[RlPlan]") -> str:
    lines = [f"{'':42}{'s a step':>10}{'rollout':>9}{'scoring':>9}{'training':>9}{'weights':>9}{'idle':>7}{'hours':>9}"]
    for one in found:
        if (phases := one.phases) is None or one.hours is None:
            lines.append(f"{one.split.describe():42}does not fit: {one.why_not}")
            continue
        shares = [phases.rollout, phases.scoring, phases.training, phases.synchronising]
        cells = "".join(f"{part / phases.step:9.0%}" for part in shares)
        cells += f"{phases.idle / phases.step:7.0%}{one.hours.median:9,.1f}"
        lines.append(f"{one.split.describe():42}{phases.step:10,.3g}{cells}")
    return "\n".join(lines)


def _trained(config: Any, shape: "ModelConfig") -> float:
    """Return the share of the weights that is trained."""
    if not config.start.has_adapters:
        return 1.0
    import torch

    from liaoyuan.models import Decoder
    from liaoyuan.tuning.lora import add_adapters

    with torch.device("meta"):
        model = Decoder(shape)
    add_adapters(model, config.method, config.lora)
    return sum(one.numel() for one in model.parameters() if one.requires_grad) / shape.num_parameters()


def _read_records(kind: Verb, config: Any) -> "Records":
    """Return how much there is to learn in the data that the run file names."""
    from liaoyuan.compute.plan.tuning import Records
    from liaoyuan.data import Tokenizer

    try:
        tokenizer = Tokenizer.load(config.model)
        if kind == "sft":
            from liaoyuan.tuning.sft_run import read_lesson

            lesson = read_lesson(config, tokenizer)
            measured = sum(len(one.tokens) for some in lesson.measured.values() for one in some)
            return Records(len(lesson.learned), sum(len(one.tokens) for one in lesson.learned), measured)
        from liaoyuan.tuning.preference import read_judged

        (learned, held_out), _ = read_judged(config, tokenizer)
        answers = [answer for item in learned for answer in item.answers]
        measured = sum(len(answer.tokens) for item in held_out for answer in item.answers)
        return Records(len(answers), sum(len(answer.tokens) for answer in answers), measured)
    except LiaoyuanError as error:
        raise LiaoyuanError(f"{error} Or say here how much there will be: --records and --mean-tokens.") from error


def _config(kind: Verb, run_file: Path, set_: list[str] | None) -> Any:
    from liaoyuan import config as configuration

    if kind == "sft":
        from liaoyuan.tuning.sft_config import SftConfig

        return configuration.load(SftConfig, run_file, set_ or [])
    if kind == "preference":
        from liaoyuan.tuning.preference_config import PreferenceConfig, check

        config = configuration.load(PreferenceConfig, run_file, set_ or [])
        check(config)
        return config
    from liaoyuan.tuning.rl_run import RlConfig

    return configuration.load(RlConfig, run_file, set_ or [])


def _kind(run_file: Path, verb: str | None) -> Verb:
    """Return which settings a run file has, by what was said or by its keys."""
    if verb is not None:
        if verb not in VERBS:
            raise LiaoyuanError(f"--verb: there is no '{verb}'{nearest(verb, VERBS) or '.'}")
        return VERBS[verb]
    keys = _keys(run_file)
    if any(key in keys for key in OF_RL):
        return "rl"
    return "preference" if any(key in keys for key in OF_PREFERENCE) else "sft"


def _is_tuning(run_file: Path) -> bool:
    """Return whether a run file is one of `liaoyuan tune`: its model is a folder, not a shape."""
    keys = _keys(run_file)
    if any(key in keys for key in OF_PRETRAINING):
        return False
    return isinstance(keys.get("model"), str) or any(key in keys for key in (*OF_RL, *OF_PREFERENCE))


def _keys(run_file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(run_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever reads it says what is wrong


def _run_file(args: list[str]) -> Path | None:
    """Return the run file among the arguments: the first that ends in .toml and is no option's value."""
    before = ""
    for one in args:
        if one.endswith(".toml") and not (before.startswith("--") and "=" not in before):
            return Path(one)
        before = one
    return None
