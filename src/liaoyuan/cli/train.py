"""`liaoyuan train`: a corpus becomes a model. On several processes: `liaoyuan launch --nproc 2 train run.toml`."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liaoyuan.cli.process import importing

if TYPE_CHECKING:
    from liaoyuan.models import ModelConfig
    from liaoyuan.training import TrainResult
    from liaoyuan.training.pretrain import PretrainConfig


def train(
    run_file: Annotated[Path | None, typer.Argument(help="TOML file: corpus, [model], [train] (none: --set).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.steps=500.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="Folder that `liaoyuan data` wrote.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/train"),
    cluster: Annotated[
        str | None, typer.Option(help='For layout = "auto": a name, such as h100, or a TOML file (default: as here).')
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Pretrain a model on a corpus, or go on from its weights. Run again to go on after a stop."""
    with importing():
        from liaoyuan.cli.auto_layout import find_layout, share_layout
        from liaoyuan.cli.progress import bar
        from liaoyuan.device import select_device
        from liaoyuan.models import read_config
        from liaoyuan.parallel import start
        from liaoyuan.training.pretrain import MODEL, pretrain

    device = select_device((config := train_config(run_file, set_, corpus)).device)
    asked = find_layout(config, out, device, cluster)
    world = start(device)
    try:
        config = share_layout(asked, world) if config.plan.auto else config
        with bar("Train", quiet=not world.is_first) as report:
            result = pretrain(config, out, report, world)
        if world.is_first:
            shape = read_config(out / MODEL)
            print(json_format.dumps(asdict(result), indent=2) if json else _summary(result, shape, out / MODEL))
    finally:
        world.close()


def train_config(run_file: Path | None, set_: list[str] | None, corpus: Path | None) -> "PretrainConfig":
    """Return the resolved config of the verb's arguments."""
    from liaoyuan import config as configuration
    from liaoyuan.training.pretrain import PretrainConfig

    overrides = [*(set_ or []), *([f"corpus={corpus}"] if corpus else [])]
    return configuration.load(PretrainConfig, run_file, overrides)


def _summary(result: "TrainResult", shape: "ModelConfig", model: Path) -> str:
    return (
        f"{shape.num_parameters():,} weights -> {model}\n"
        f"  {result.steps:,} steps, {result.tokens:,} tokens, last loss {result.loss:.4f}\n"
        f"  {result.tokens_per_second:,.0f} tokens/s, {result.flops / max(result.seconds, 1e-9) / 1e9:,.1f} GFLOP/s, "
        f"{result.cpu_seconds:,.0f} CPU-seconds"
    )
