"""`liaoyuan eval`: accuracy of a model on problems with checkable answers."""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of a model with its tokenizer.")],
    task: Annotated[str, typer.Option(help="Name of a task, or a task file (.toml).")] = "addition",
    levels: Annotated[str, typer.Option(help="Levels of difficulty: '2-4', or '3'.")] = "2-4",
    problems: Annotated[int, typer.Option(min=1, help="Test problems, spread over the levels.")] = 2000,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each problem, for pass@k.")] = 8,
    fast: Annotated[bool, typer.Option("--fast", help="Answer at once, without a thought.")] = False,
    quantise: Annotated[str | None, typer.Option(help="Quantise the weights first: int8, int4 or fp8.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    seen: Annotated[bool, typer.Option("--seen", help="Also problems that the model was trained on.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure accuracy on test problems that no training has seen: greedy, sampled and pass@k, with intervals."""
    import torch

    from liaoyuan.checkpoint import load_model
    from liaoyuan.cli.levels import read_levels
    from liaoyuan.cli.progress import bar
    from liaoyuan.data import Tokenizer
    from liaoyuan.device import select_device
    from liaoyuan.evaluation import bootstrap, measure_accuracy
    from liaoyuan.inference import Engine
    from liaoyuan.models import quantisation_named
    from liaoyuan.tasks import check_levels, held_out_problems, open_task
    from liaoyuan.tasks.seen import refuse_seen

    assignment, wanted = open_task(task), read_levels(levels)
    chosen = assignment.task
    check_levels(chosen, wanted, f"--levels {levels}")
    asked = held_out_problems(chosen, wanted, problems)
    known = refuse_seen(model, asked, allow=seen)
    few_bits = quantisation_named(quantise)
    engine = Engine(load_model(model, device=select_device().torch, quantisation=few_bits))
    with bar("Answering") as report, torch.inference_mode():
        answers = measure_accuracy(
            engine, Tokenizer.load(model), assignment.right, asked, samples, thinking=not fast, seed=seed, report=report
        )
    measures = {"greedy": answers.greedy, "sampled": answers.sampled_mean, f"pass_at_{samples}": answers.pass_at_k}
    result = {name: bootstrap(values).to_dict() for name, values in measures.items()}
    if json:
        figures = {"task": task, "problems": problems, "seen": known, "samples": samples, "accuracy": result}
        print(json_format.dumps(figures))
        return
    if known:
        print(f"NOT A TEST: the model was trained on {known:,} of these {len(asked):,} problems.")
    for name, value in result.items():
        print(f"{name:>10}  {100 * value['mean']:5.1f}%  ({100 * value['low']:.1f} to {100 * value['high']:.1f})")
