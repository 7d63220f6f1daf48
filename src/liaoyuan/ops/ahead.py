"""An accelerator's kernels compiled before anybody waits for them: Triton keeps on the disk what it has compiled."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import choice
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.rundir import Progress, Report, silent

MOST_PROCESSES = 8  # each holds some memory of the card


def compile_ahead(device: str, report: Report = silent) -> list[str]:
    """Compile and test the kernels for a kind of device, those for exactness too; return the operators that have one.

    In several processes, since each kernel's compiler takes one core, for minutes in all.

    Raises:
        LiaoyuanError: one of the processes was killed.
    """
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        asked = {pool.submit(_has_kernel, name, device): name for name in OPERATORS}
        try:
            for done, one in enumerate(as_completed(asked), 1):
                report(Progress(done, len(asked), "operator", asked[one]))
            return sorted(name for one, name in asked.items() if one.result())
        except BrokenProcessPool:
            raise LiaoyuanError(
                f"A process that compiled kernels for {device} was killed, as a rule for want of memory. What was "
                "compiled is kept: the same command goes on; without it kernels are compiled when they are first used."
            ) from None


def _has_kernel(name: str, device: str) -> bool:
    choice.seek_exactness()  # it takes all that is taken without, and more
    return choice.kernel_in_use(name, device) != choice.REFERENCE
