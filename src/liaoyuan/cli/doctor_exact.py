"""`liaoyuan doctor --exact MODEL`: whether a model's log-probabilities have the same bits however it is computed."""

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liaoyuan.inference import Proof


def show_proof(folder: Path, dtype: str | None, device: str, json: bool) -> bool:
    """Prove the model of a folder exact, print the proof, and return whether it is."""
    from liaoyuan.cli.progress import bar
    from liaoyuan.compute.subject import open_model
    from liaoyuan.device import select_device
    from liaoyuan.inference import prove

    model, _ = open_model(folder, select_device(device).torch, dtype)
    with bar("exact", quiet=json) as report:
        proof = prove(model.eval(), report=report)
    if json:
        print(json_text.dumps(proof_values(proof), indent=2))
    else:
        _show(proof)
    return proof.exact


def proof_values(proof: "Proof") -> dict[str, Any]:
    """Return a proof as plain values."""
    rows = [vars(result) | {"equal": result.equal} for result in proof.results]
    return {
        "exact": proof.exact,
        "verdict": proof.verdict,
        "dtype": proof.dtype,
        "kernels": proof.kernels,
        "loose": proof.loose,
        "operator": proof.operator,
        "paths": rows,
    }


def _show(proof: "Proof") -> None:
    from rich.console import Console
    from rich.table import Table

    threads = sorted({result.threads for result in proof.results})
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"compared with training, {proof.dtype}")
    for number in threads:
        table.add_column(f"{number} thread{'s' if number > 1 else ''}")
    cells = {(result.path, result.threads): _cell(result) for result in proof.results}
    for path in dict.fromkeys(result.path for result in proof.results):
        table.add_row(path, *(cells[path, number] for number in threads))
    console = Console(highlight=False)
    console.print(table)
    kernels = sorted(set(proof.kernels.values()))
    console.print(f"{len(proof.kernels)} operators, computed by: {', '.join(kernels)}.", soft_wrap=True)
    console.print(proof.verdict, soft_wrap=True)


def _cell(result: Any) -> str:
    if not result.compared:
        return "not met"
    if result.equal:
        return f"{result.compared} of {result.compared}"
    return f"{result.compared - result.unequal} of {result.compared}, {result.largest:.0e} apart"
