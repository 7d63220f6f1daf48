"""`liaoyuan tune`: teach a model by examples (sft), judged answers (dpo, reward), checked answers (rl) or another model
(distill).
"""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liaoyuan.cli.process import importing
from liaoyuan.cli.tune_options import (
    HeldOut,
    Json,
    Judged,
    Lora,
    Model,
    Out,
    Problems,
    RunFile,
    Set,
    SkipBad,
    Task,
    adapter_method,
    read_config,
    with_flags,
)
from liaoyuan.cli.tune_sample import sample
from liaoyuan.cli.tune_study import study

if TYPE_CHECKING:
    from liaoyuan.tuning.preference_config import PreferenceConfig
    from liaoyuan.tuning.rl_run import RlConfig
    from liaoyuan.tuning.sft_config import SftConfig
    from liaoyuan.tuning.start import Start

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Teach a model: sft (examples), dpo and reward (judged answers), rl (checked answers), distill (a teacher).",
)

app.command()(study)
app.command()(sample)


@app.command()
def sft(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    data: Annotated[Path | None, typer.Option(help="Examples to learn: .jsonl, .json (also .zst), .parquet.")] = None,
    lora: Lora = False,
    validation: Annotated[Path | None, typer.Option(help="Held-out examples; else 5% of the data.")] = None,
    out: Out = Path("runs/sft"),
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Fine-tune on conversations, of which the assistant's tokens are learned, or texts. Also under torchrun (FSDP)."""
    with importing():
        from liaoyuan.cli.live_report import followed
        from liaoyuan.device import select_device
        from liaoyuan.parallel import start
        from liaoyuan.tuning.sft_run import run_sft

    config = sft_config(run_file, with_flags(set_, skip_bad=skip_bad), model, data, lora, validation)
    world = start(select_device(config.device))
    try:
        with followed("SFT", out, quiet=not world.is_first) as report:
            result = run_sft(config, out, report, world)
        if world.is_first:
            _show_sft(result, config, out, json)
    finally:
        world.close()


@app.command()
def dpo(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    data: Judged = None,
    lora: Lora = False,
    loss: Annotated[str | None, typer.Option(help="dpo, ipo, kto, orpo or simpo.")] = None,
    held_out: HeldOut = None,
    task: Annotated[str | None, typer.Option(help="Also ask the models test problems of this task.")] = None,
    control: Annotated[bool, typer.Option("--control", help="Also SFT on the chosen answers, same compute.")] = False,
    out: Out = Path("runs/dpo"),
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Learn which of two answers is better, and measure it against the start. Also under torchrun (FSDP)."""
    overrides = with_flags(set_, skip_bad=skip_bad, control=control)
    config = preference_config(run_file, overrides, model, data, held_out, loss, lora, task)
    _prefer("DPO", config, out, json)


@app.command()
def reward(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    data: Judged = None,
    lora: Lora = False,
    held_out: HeldOut = None,
    out: Out = Path("runs/reward"),
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Train a reward model on judged answers: the better one gets the higher reward (Bradley and Terry)."""
    config = preference_config(run_file, with_flags(set_, skip_bad=skip_bad), model, data, held_out, "reward", lora)
    _prefer("Reward", config, out, json)


def preference_config(
    run_file: Path | None,
    set_: list[str] | None,
    model: Path | None,
    data: Path | None,
    held_out: Path | None,
    loss: str | None,
    lora: bool = False,
    task: str | None = None,
) -> "PreferenceConfig":
    """Return the resolved config of the verbs' arguments."""
    with importing():
        from liaoyuan.tuning.preference_config import PreferenceConfig

    files = {"model": model, "data": data, "held_out": held_out}
    method = adapter_method(lora, set_)
    shortcuts = {**files, "preference.loss": loss, "method": method, "ask.task": task}
    config: PreferenceConfig = read_config(PreferenceConfig, run_file, set_, shortcuts)
    return config


def _prefer(title: str, config: "PreferenceConfig", out: Path, json: bool) -> None:
    with importing():
        from liaoyuan.cli.live_report import followed
        from liaoyuan.device import select_device
        from liaoyuan.parallel import start
        from liaoyuan.tuning.preference import run_preference

    world = start(select_device(config.device))
    try:
        with followed(title, out, quiet=not world.is_first) as report:
            result = run_preference(config, out, report, world)
        if world.is_first and json:
            print(json_format.dumps(result))
        elif world.is_first:
            _show_comparison(result.pop("comparison"))
            _show(result, out, json, config.start)
    finally:
        world.close()


def _show_comparison(comparison: dict[str, Any]) -> None:
    """Print measures with their intervals, a column a model; margins are nats, all else percent."""
    print(f"On {comparison['held_out']} held-out records, with 95% intervals:")
    columns = {name: measures for name, measures in comparison.items() if name != "held_out"}
    print(" " * 18 + "".join(f"{name:>26}" for name in columns))
    for key in comparison["model"]:
        size = 1 if key == "margin" else 100
        cells = ({part: size * value for part, value in measures[key].items()} for measures in columns.values())
        texts = ("{mean:.1f} ({low:.1f} to {high:.1f})".format(**cell) for cell in cells)
        print(f"{key:>18}" + "".join(f"{text:>26}" for text in texts))


@app.command()
def rl(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    task: Task = None,
    data: Problems = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train an adapter alone; rl.learning_rate is then 4e-3, else 8e-4.")
    ] = False,
    out: Out = Path("runs/rl"),
    json: Json = False,
) -> None:
    """Reinforce on fresh problems, rewarded by checked answers; the best checkpoint is kept, and compared."""
    _reinforce("RL", rl_config(run_file, set_, model, task, data, lora=lora), out, json)


@app.command()
def distill(
    run_file: RunFile = None,
    set_: Set = None,
    model: Model = None,
    teacher: Annotated[Path | None, typer.Option(help="Folder of the model to learn from; same vocabulary.")] = None,
    task: Task = None,
    data: Problems = None,
    out: Out = Path("runs/distill"),
    json: Json = False,
) -> None:
    """Learn on own answers what a teacher thinks of each token; the best checkpoint is kept, and compared."""
    from liaoyuan.errors import LiaoyuanError

    config = rl_config(run_file, set_, model, task, data, teacher)
    if config.teacher is None:
        raise LiaoyuanError("tune distill needs a model to learn from: give --teacher DIR.")
    _reinforce("Distill", config, out, json)


def rl_config(
    run_file: Path | None,
    set_: list[str] | None,
    model: Path | None,
    task: str | None,
    data: Path | None,
    teacher: Path | None = None,
    lora: bool = False,
) -> "RlConfig":
    """Return the resolved config of the verbs' arguments."""
    with importing():
        from liaoyuan.tuning.rl_run import RlConfig

    method = adapter_method(lora, set_)
    shortcuts = {"model": model, "teacher": teacher, "task": task, "data": data, "method": method}
    config: RlConfig = read_config(RlConfig, run_file, set_, shortcuts)
    return config


def _reinforce(title: str, config: "RlConfig", out: Path, json: bool) -> None:
    with importing():
        from liaoyuan.cli.gain import gain_lines
        from liaoyuan.cli.live_report import followed
        from liaoyuan.tuning.rl_run import run_rl

    with followed(title, out) as report:
        result = run_rl(config, out, report)
    _show(result, out, json, config.start)
    if not json and "accuracy" in result:
        print("\n".join(gain_lines(result["accuracy"], result["test_problems"])))


def sft_config(
    run_file: Path | None,
    set_: list[str] | None,
    model: Path | None,
    data: Path | None,
    lora: bool = False,
    validation: Path | None = None,
) -> "SftConfig":
    """Return the config of the verb's arguments."""
    with importing():
        from liaoyuan.tuning.sft_config import SftConfig

    method = adapter_method(lora, set_)
    shortcuts = {"model": model, "data": data, "method": method, "validation": validation}
    config: SftConfig = read_config(SftConfig, run_file, set_, shortcuts)
    return config


def _show_sft(result: dict[str, Any], config: "SftConfig", out: Path, json: bool) -> None:
    from liaoyuan.cli.comparison import comparison_lines

    if json:
        print(json_format.dumps(result))
        return
    compared = result.pop("comparison", None)
    _show(result, out, json, config.start)
    if compared:
        print("\n".join(comparison_lines(compared)))
    else:
        print("No records were held out, so nothing says what it learned: give more of them, or --validation FILE.")


def _figures(result: dict[str, Any]) -> list[str]:
    return [
        f"  {key}: {value:,.4g}" if isinstance(value, float) else f"  {key}: {value:,}"
        for key, value in result.items()
        if not isinstance(value, dict)
    ]


def _show(result: dict[str, Any], out: Path, json: bool, start: "Start") -> None:
    if json:
        print(json_format.dumps(result))
        return
    print("\n".join(_figures(result)))
    place = out / start.name
    if start.has_adapters:
        print(f"The adapter is in {place}; a model of its own is made of it by")
        print(f"  liaoyuan convert --merge {place} --model {start.model} --out DIR")
    else:
        print(f"The model is in {place}.")
