"""`liaoyuan doctor --exact MODEL`: whether a model's log-probabilities have the same bits however it is computed."""

import json as json_text
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liaoyuan.inference import Proof
    from liaoyuan.rundir import Report


def show_proof(folder: Path, dtype: str | None, device: str, json: bool, tp: int = 1, ep: int = 1) -> bool:
    """Prove the model of a folder exact, over `tp` processes if there are several, print the proof, and return whether
    it is.
    """
    from liaoyuan.cli.progress import bar
    from liaoyuan.ops import seek_exactness

    seek_exactness()
    with bar("exact", quiet=json) as report:
        if tp * ep == 1:
            proof = _proof(folder, dtype, device, report)
        else:
            proof = _spread(folder, dtype, device, report, tp, ep)
    if json:
        print(json_text.dumps(proof_values(proof), indent=2))
    else:
        _show(proof)
    return proof.exact


def _proof(folder: Path, dtype: str | None, device: str, report: "Report") -> "Proof":
    from liaoyuan.compute.subject import open_model
    from liaoyuan.device import select_device
    from liaoyuan.inference import prove

    model, _ = open_model(folder, select_device(device).torch, dtype, gradients=False)
    return prove(model.eval(), report=report)


def _spread(folder: Path, dtype: str | None, device: str, report: "Report", tp: int, ep: int) -> "Proof":
    """Prove it in the processes that would serve it."""
    from liaoyuan.compute.subject import check_dtype
    from liaoyuan.inference import FULL, prove
    from liaoyuan.inference.spread.ranks import open_ranks
    from liaoyuan.parallel import Layout

    name = check_dtype(dtype) if dtype else None
    layout = Layout(tp=tp, ep=ep, fsdp=1, exact=True)
    with open_ranks(folder, layout, device, lambda why: print(why, file=sys.stderr), dtype=name) as leader:
        return prove(leader.model, FULL, report, leader)


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
        "layout": proof.layout,
        "against": proof.against,
        "paths": rows,
    }


def _show(proof: "Proof") -> None:
    from rich.console import Console
    from rich.table import Table

    threads = sorted({result.threads for result in proof.results})
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"compared with {proof.against}, {proof.dtype}")
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
