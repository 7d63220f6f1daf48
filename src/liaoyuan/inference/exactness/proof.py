"""Exact mode, proven: in whatever way a model computes a token, its log-probability has the same bits.

The contract is that the order in which an output's row is summed depends on that row alone. It is kept by the kernels,
not switched on, so a proof is all that exact mode adds: the same requests pass through training's forward and through
the engine in every way that it has, and all log-probabilities are compared bit by bit. Where one differs, the proof
names the first operator whose bits do, and claims nothing. (He et al. 2025, "Defeating nondeterminism in LLM
inference", have the cause: sums whose order depends on the batch.)
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from liaoyuan import ops
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.exactness.paths import (
    FULL,
    QUICK,
    Extent,
    Found,
    NotMetError,
    Path,
    Probe,
    decode,
    draw_probes,
    paths_of,
    teacher_forcing,
)
from liaoyuan.inference.exactness.trace import first_difference, operators_of
from liaoyuan.models import Decoder
from liaoyuan.ops.build import cache_folder, library_path
from liaoyuan.rundir import Progress, Report, silent, write_atomic


@dataclass(frozen=True)
class Result:
    """One way to compute, compared with training's forward.

    compared: how many log-probabilities; unequal: how many of them have other bits; largest: difference in nats.
    reason: why nothing was compared, where that is so.
    """

    path: str
    threads: int
    compared: int
    unequal: int = 0
    largest: float = 0.0
    reason: str = ""

    @property
    def equal(self) -> bool:
        return self.compared > 0 and self.unequal == 0


@dataclass(frozen=True)
class Proof:
    """What was compared, of which model: its dtype and the kernels that computed it.

    kernels: of the operators that were called. loose: those of them whose kernel does not promise that a row's bits are
        its own, such as the references: what they gave here is no proof for other batches.
    operator: the first whose bits differ, with its module, where any path's do.
    """

    results: tuple[Result, ...]
    dtype: str
    kernels: dict[str, str]
    loose: tuple[str, ...] = ()
    operator: str = ""

    @property
    def exact(self) -> bool:
        """Whether every path was compared, and equal, by kernels that promise it."""
        return bool(self.results) and not self.loose and all(result.equal for result in self.results)

    @property
    def verdict(self) -> str:
        """A sentence that says what was proven, or what is against it."""
        if self.exact:
            return f"Exact: all {sum(result.compared for result in self.results)} log-probabilities have the same bits."
        wrong = next((result for result in self.results if not result.equal), None)
        if wrong is None:
            return (
                f"Not proven: no bit differed, but {', '.join(self.loose)} had no kernel that promises it: in another "
                "batch it may sum in another order."
            )
        where = f"{wrong.path}, {wrong.threads} thread{'s' if wrong.threads > 1 else ''}"
        if not wrong.compared:
            return f"Not proven: {where}: {wrong.reason}."
        blame = f" The first operator whose bits differ is {self.operator}." if self.operator else ""
        count = f"{wrong.unequal} of {wrong.compared} log-probabilities differ, by up to {wrong.largest:.1e}"
        return f"Not exact: {where}: {count}.{blame}"


def prove(model: Decoder, extent: Extent = FULL, report: Report = silent) -> Proof:
    """Compare every way to compute `model`'s log-probabilities on this machine with training's forward.

    The weights are left as they are. Random tokens are as good as text: no order of summation depends on values.
    """
    threads, paths = _threads(model, extent), paths_of(extent)
    results, operator = list[Result](), ""
    with _threads_kept():
        torch.set_num_threads(threads[0])
        probes = draw_probes(model, extent)
        expected = teacher_forcing(model, probes, alone=True, learns=True)
        for number in threads:
            torch.set_num_threads(number)
            some = slice(None, None, 1 if number == threads[0] else extent.stride)
            for path in paths:
                report(Progress(len(results), len(threads) * len(paths), "path", path.name))
                result, wrong = _compare(path, model, probes[some], expected[some], number)
                results.append(result)
                if wrong and not operator:
                    operator = first_difference(model, probes[some], path, wrong)
        called = operators_of(model, probes[:1], [paths[0], Path("decode", decode(1))])
    status = [row for row in ops.status(model.embed_tokens.weight.device.type) if row.operator in called]
    kernels = {row.operator: row.kernel for row in status}
    loose = tuple(row.operator for row in status if not row.exact)
    return Proof(tuple(results), str(model.config.torch_dtype).removeprefix("torch."), kernels, loose, operator)


def require_exact(model: Decoder) -> None:
    """Raise LiaoyuanError if it cannot be proven quickly that this model is exact here."""
    if not (proof := find_proof(model)).exact:
        raise LiaoyuanError(
            f"Exact mode was asked for and cannot be had. {proof.verdict} See liaoyuan doctor --exact, or do without "
            "exact mode if the last bits do not matter."
        )


def find_proof(model: Decoder, extent: Extent = QUICK) -> Proof:
    """Return the proof of this model with the threads that it has here, kept from before or made now."""
    try:
        place = cache_folder() / "exact" / f"{_key(model, extent)}.json"
        kept = json.loads(place.read_text(encoding="utf-8"))
        return Proof(**kept | {"results": tuple(Result(**result) for result in kept["results"])})
    except (LiaoyuanError, OSError, ValueError, TypeError, KeyError):
        pass  # there is no folder for it, or no proof in it, or a torn one: made anew
    proof = prove(model, extent)
    with contextlib.suppress(LiaoyuanError, OSError):  # what cannot be kept is proven again the next time
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(asdict(proof)))
    return proof


def _key(model: Decoder, extent: Extent) -> str:
    """Return a name of what a proof depends on: weights, kernels (with compiler, torch and processor), threads."""
    device = model.embed_tokens.weight.device.type
    kernels = [f"{row.operator} {row.kernel}" for row in ops.status(device)]
    parts = [repr(model.config), repr(extent), device, str(torch.get_num_threads()), library_path().name, *kernels]
    parts += [f"{name} {tensor.dtype} {ops.checksum(tensor)}" for name, tensor in model.state_dict().items()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compare(
    path: Path, model: Decoder, probes: Sequence[Probe], expected: Found, threads: int
) -> tuple[Result, list[tuple[int, int]]]:
    """Return a path's result, and the probes and positions after which bits are other ones."""
    try:
        found = path.run(model, probes)
    except NotMetError as reason:
        return Result(path.name, threads, 0, reason=str(reason)), []
    wanted, given = np.concatenate(expected), np.concatenate(found)
    here = ~np.isnan(given)
    differ = here & (wanted.view(np.int32) != given.view(np.int32))
    gaps = np.abs(wanted[differ].astype(np.float64) - given[differ])
    places = [(number, place) for number, values in enumerate(expected) for place in range(len(values))]
    wrong = [places[place] for place in np.flatnonzero(differ)]
    return Result(path.name, threads, int(here.sum()), int(differ.sum()), float(gaps.max(initial=0.0))), wrong


def _threads(model: Decoder, extent: Extent) -> tuple[int, ...]:
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    return extent.threads if extent.threads and on_cpu else (torch.get_num_threads(),)


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
