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
from dataclasses import asdict, dataclass, replace

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
from liaoyuan.inference.exactness.subject import Subject
from liaoyuan.inference.exactness.trace import first_difference, operators_of
from liaoyuan.inference.spread.memory import Memory
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.models import Decoder
from liaoyuan.ops.build import cache_folder, library_path, processor
from liaoyuan.rundir import Progress, Report, silent, write_atomic

TRAINING = "training"
WHOLE_TEXTS = "the model's own forward over whole texts"


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
    layout: of the processes over which the model is spread; "" for one.
    against: with what the paths were compared.
    """

    results: tuple[Result, ...]
    dtype: str
    kernels: dict[str, str]
    loose: tuple[str, ...] = ()
    operator: str = ""
    layout: str = ""
    against: str = TRAINING

    @property
    def exact(self) -> bool:
        """Whether every path was compared, and equal, by kernels that promise it."""
        return bool(self.results) and not self.loose and all(result.equal for result in self.results)

    @property
    def verdict(self) -> str:
        """A sentence that says what was proven, or what is against it."""
        if self.exact:
            total = sum(result.compared for result in self.results)
            return f"Exact{self._where}: all {total} log-probabilities have the same bits."
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
        return f"Not exact{self._where}: {where}: {count}.{blame}"

    @property
    def _where(self) -> str:
        return f" under {self.layout}" if self.layout else ""


def prove(model: Decoder, extent: Extent = FULL, report: Report = silent, memory: Memory | None = None) -> Proof:
    """Compare every way to compute `model`'s log-probabilities on this machine with training's forward.

    The weights are left as they are. Random tokens are as good as text: no order of summation depends on values.

    Args:
        memory: where the model lies, if not in this process alone. Training's forward is then that of the same layout
            over the same processes, or, if training does not know these weights, the model's own over whole texts.

    Raises:
        LiaoyuanError: the model lies over processes in a layout that is not exact.
    """
    subject = _subject(model, memory)
    try:
        return _prove(subject, extent, report)
    finally:
        if subject.leader and not subject.leader.failure:
            subject.leader.end_learning()


def _prove(subject: Subject, extent: Extent, report: Report) -> Proof:
    threads, paths = _threads(subject, extent), paths_of(extent)
    if subject.leader and not subject.can_learn:
        paths[0] = replace(paths[0], name="whole texts, packed")
    results, operator = list[Result](), ""
    with _threads_kept():
        torch.set_num_threads(threads[0])
        probes = draw_probes(subject, extent)
        expected = teacher_forcing(subject, probes, alone=True, learns=True)
        for number in threads:
            torch.set_num_threads(number)
            some = slice(None, None, 1 if number == threads[0] else extent.stride)
            for path in paths:
                report(Progress(len(results), len(threads) * len(paths), "path", path.name))
                result, wrong = _compare(path, subject, probes[some], expected[some], number)
                results.append(result)
                if wrong and not operator:
                    operator = first_difference(subject, probes[some], path, wrong)
        called = operators_of(subject, probes[:1], [paths[0], Path("decode", decode(1))])
    status = [row for row in ops.status(subject.device.type) if row.operator in called]
    promised = subject.leader.promised() if subject.leader else {row.operator for row in status if row.exact}
    loose = tuple(row.operator for row in status if row.operator not in promised)
    kernels = {row.operator: row.kernel for row in status}
    dtype = str(subject.model.config.torch_dtype).removeprefix("torch.")
    return Proof(tuple(results), dtype, kernels, loose, operator, subject.layout, _against(subject))


def _subject(model: Decoder, memory: Memory | None) -> Subject:
    leader = memory if isinstance(memory, Leader) else None
    if leader and not leader.layout.exact:
        raise LiaoyuanError(
            f"The layout {leader.layout.describe()} is not exact: lay the model out with exact = true, which keeps "
            "experts whole as training does."
        )
    return Subject(model, leader)


def _against(subject: Subject) -> str:
    if not subject.leader:
        return TRAINING
    return f"{TRAINING if subject.can_learn else WHOLE_TEXTS} under {subject.layout}"


def require_exact(model: Decoder, memory: Memory | None = None) -> None:
    """Have exact kernels chosen; raise LiaoyuanError if it cannot be proven quickly that this model is exact here."""
    ops.seek_exactness()
    if not (proof := find_proof(model, memory=memory)).exact:
        raise LiaoyuanError(
            f"Exact mode was asked for and cannot be had. {proof.verdict} See liaoyuan doctor --exact, or do without "
            "exact mode if the last bits do not matter."
        )


def find_proof(model: Decoder, extent: Extent = QUICK, memory: Memory | None = None) -> Proof:
    """Return the proof of this model with the threads and processes that it has here, kept from before or made now."""
    try:
        place = cache_folder() / "exact" / f"{_key(_subject(model, memory), extent)}.json"
        kept = json.loads(place.read_text(encoding="utf-8"))
        return Proof(**kept | {"results": tuple(Result(**result) for result in kept["results"])})
    except (LiaoyuanError, OSError, ValueError, TypeError, KeyError):
        pass  # there is no folder for it, or no proof in it, or a torn one: made anew
    proof = prove(model, extent, silent, memory)
    with contextlib.suppress(LiaoyuanError, OSError):  # what cannot be kept is proven again the next time
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(asdict(proof)))
    return proof


def _key(subject: Subject, extent: Extent) -> str:
    """Return a name of what a proof depends on: weights, kernels (with compiler, torch and processor), threads, and the
    layout over processes.
    """
    model, device = subject.model, subject.device.type
    kernels = [f"{row.operator} {row.kernel}" for row in ops.status(device)]
    parts = [repr(model.config), repr(extent), device, str(torch.get_num_threads()), _machine(), *kernels]
    if subject.leader:
        return _digest([*parts, repr(subject.leader.layout), subject.leader.checksum()])
    parts += [f"{name} {tensor.dtype} {ops.checksum(tensor)}" for name, tensor in model.state_dict().items()]
    return _digest(parts)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _machine() -> str:
    """Return a name of compiled kernels and what they depend on; without a compiler, of torch and the processor."""
    try:
        return library_path().name
    except LiaoyuanError:
        return f"{torch.__version__} {processor()}"


def _compare(
    path: Path, subject: Subject, probes: Sequence[Probe], expected: Found, threads: int
) -> tuple[Result, list[tuple[int, int]]]:
    """Return a path's result, and the probes and positions after which bits are other ones."""
    try:
        found = path.run(subject, probes)
    except NotMetError as reason:
        return Result(path.name, threads, 0, reason=str(reason)), []
    wanted, given = np.concatenate(expected), np.concatenate(found)
    here = ~np.isnan(given)
    differ = here & (wanted.view(np.int32) != given.view(np.int32))
    gaps = np.abs(wanted[differ].astype(np.float64) - given[differ])
    places = [(number, place) for number, values in enumerate(expected) for place in range(len(values))]
    wrong = [places[place] for place in np.flatnonzero(differ)]
    return Result(path.name, threads, int(here.sum()), int(differ.sum()), float(gaps.max(initial=0.0))), wrong


def _threads(subject: Subject, extent: Extent) -> tuple[int, ...]:
    """Return with how many threads to compute; processes that share a machine keep those that they have."""
    on_cpu = subject.device.type == "cpu" and subject.leader is None
    return extent.threads if extent.threads and on_cpu else (torch.get_num_threads(),)


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
