"""`liaoyuan convert --merge` and `--quantise`: what was trained becomes a model to ship, if it still is that model."""

import json as json_format
from pathlib import Path
from typing import Any

from liaoyuan.errors import LiaoyuanError


def one_of(argument: Path | None, option: Path | None, name: str, flag: str) -> Path:
    """Return the folder that was given, as an argument or with its flag.

    Raises:
        LiaoyuanError: neither was given, or both.
    """
    if (argument is None) == (option is None):
        wrong = "is missing" if argument is None else "was given twice"
        raise LiaoyuanError(f"{name} {wrong}: write it once, as an argument or with {flag}.")
    chosen = argument or option
    assert chosen is not None
    return chosen


def refuse_with_export(state: bool, run_file: bool, step: bool, tokenizer: bool) -> None:
    """Raise LiaoyuanError if an option of other conversions was given."""
    given = {"--to state": state, "--run-file or --set": run_file, "--step": step, "--tokenizer": tokenizer}
    wrong = next((name for name, is_given in given.items() if is_given), None)
    if wrong:
        raise LiaoyuanError(f"{wrong} does not go with --merge and --quantise, which work on a model folder.")


def run_export(
    source: Path,
    target: Path,
    merge: Path | None,
    quantise: str | None,
    dtype: str | None,
    limit: int,
    texts: Path | None,
    task: str | None,
    max_divergence: float | None,
    max_drop: float | None,
    force: bool,
    skip_bad: bool,
    json: bool,
) -> None:
    """Export and print the gate's figures."""
    from liaoyuan.checkpoint.convert import refuse_target
    from liaoyuan.cli.progress import bar
    from liaoyuan.tuning.export import Export, export

    refuse_target(target, source, force, mark="config.json")
    request = Export(
        source, target, merge, quantise, dtype, limit, texts, task, max_divergence, max_drop, force, skip_bad
    )
    with bar("Export") as report:
        figures = export(request, report)
    if json:
        print(json_format.dumps({"source": str(source), "target": str(target), **figures}, indent=2))
    else:
        print("\n".join(_lines(request, figures)))


def _lines(request: Any, figures: dict[str, Any]) -> list[str]:
    """Return what is printed: the figures, each beside what is tolerated."""
    tolerance, accuracy, loss = request.tolerance, figures["token_accuracy"], figures["loss"]
    adapter = f" with the adapter {request.adapter}" if request.adapter else ""
    bits = f", {request.quantise}" if request.quantise else ""
    lines = [
        f"{request.base}{adapter}{bits} -> {request.target}",
        f"  compared with what was trained, on {figures['records']:,} held-out records ({figures['tokens']:,} tokens)"
        + (f"; {figures['left_out']:,} were left out:" if figures["left_out"] else ":"),
        f"  divergence      {figures['divergence']:.5f} nats a token; 99th percentile {figures['divergence_99th']:.4f}"
        f"  (tolerated: {tolerance.divergence:g})",
        f"  same choice     {100 * figures['same_first']:.2f}% of places  (tolerated: {100 * tolerance.same_first:g}%)",
        f"  log-probability {figures['log_prob_difference']:.5f} off on average, "
        f"{figures['log_prob_difference_largest']:.4f} at most",
        f"  loss            {loss['trained']:.4f} -> {loss['exported']:.4f}",
        f"  token accuracy  {_change(accuracy)}  (tolerated: {100 * tolerance.drop:g} points less)",
    ]
    if "task" in figures:
        lines.append(f"  {figures['task']['name']:15} {_change(figures['task'])}, greedy, of held-out problems")
    if not figures["tolerated"]:
        lines.append("  This is beyond what is tolerated; it was written because of --force, and its card says so.")
    return [*lines, f"Its card is {request.target / 'README.md'}."]


def _change(values: dict[str, Any]) -> str:
    before, after, difference = values["trained"], values["exported"], values["difference"]
    points = {key: 100 * value for key, value in difference.items()}
    interval = f"({points['mean']:+.2f}, {points['low']:+.2f} to {points['high']:+.2f})"
    return f"{100 * before:.2f}% -> {100 * after:.2f}% {interval}"
