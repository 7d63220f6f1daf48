"""Compile the C++ kernels for this machine, once, into the user's cache folder.

The library's name is a hash of everything that it depends on (sources, compiler, flags, torch, this CPU), so a
change of any of them compiles anew and an old library is never loaded by mistake. A failed build leaves its
reason beside where the library would be, so that it is not tried again by every process.
"""

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, silent, write_atomic

NATIVE = Path(__file__).parent / "native"
KERNEL_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
BINDING_FLAGS = ("-O1", "-fopenmp")
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-w")
# The others include no header of torch, which would cost seconds.
WITH_TORCH = (
    *("binding.cpp", "autograd.cpp", "binding_attention.cpp", "binding_experts.cpp", "autograd_experts.cpp"),
    *("binding_inference.cpp", "binding_optimiser.cpp", "binding_loss.cpp", "autograd_loss.cpp"),
    *("binding_rows.cpp", "autograd_rows.cpp"),
)


def build(report: Report = silent) -> Path:
    """Compile the kernels unless this machine has them already, and return the library.

    Raises:
        LiaoyuanError: there is no C++ compiler, or it does not accept the sources; the references work without.
    """
    target = library_path()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and then finds the library
        if not target.exists():
            try:
                _compile(target, report)
            except LiaoyuanError as error:
                write_atomic(_failure_note(target), str(error))
                raise
    return target


def find_library() -> Path:
    """Return the library as `build` does, but do not try again what failed before."""
    target = library_path()
    note = _failure_note(target)
    if not target.exists() and note.exists():
        raise LiaoyuanError(note.read_text(encoding="utf-8"))
    return build()


def library_path() -> Path:
    """Return where this machine's library is, or will be. Raises LiaoyuanError if there is no compiler."""
    parts = [_compiler_version(compiler()), torch.__version__, str(torch.compiled_with_cxx11_abi()), _cpu()]
    parts += [*KERNEL_FLAGS, *BINDING_FLAGS, *COMMON_FLAGS]
    for source in sorted(NATIVE.iterdir()):
        parts += [source.name, source.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    cache = os.environ.get("XDG_CACHE_HOME")  # the desktop convention for where caches go
    folder = Path(cache) if cache else Path.home() / ".cache"
    return folder / "liaoyuan" / "kernels" / f"{digest}.so"


def compiler() -> str:
    """Return the path of the C++ compiler."""
    found = shutil.which("g++") or shutil.which("c++")
    if not found:
        raise LiaoyuanError("There is no C++ compiler (g++), so the slower reference operators are used.")
    return found


def _compile(target: Path, report: Report) -> None:
    sources = sorted(NATIVE.glob("*.cpp"), key=lambda path: path.name not in WITH_TORCH)  # the longest first
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            commands = [
                [compiler(), *_flags(s), "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)
            ]
            for done, _ in enumerate(pool.map(_run, commands)):
                report(Progress(done + 1, len(sources) + 1, "file", "compiling kernels"))
        library = Path(folder) / "kernels.so"
        _run([compiler(), "-shared", *map(str, objects), *_libraries(), "-o", str(library)])
        library.replace(target)
    report(Progress(len(sources) + 1, len(sources) + 1, "file", "compiling kernels"))


def _flags(source: Path) -> Sequence[str]:
    if source.name not in WITH_TORCH:
        return [*COMMON_FLAGS, *KERNEL_FLAGS]
    include = Path(torch.__file__).parent / "include"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    places = [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    return [*COMMON_FLAGS, *BINDING_FLAGS, abi, *places]


def _libraries() -> list[str]:
    """Name torch's own libraries, and its own OpenMP runtime: a second one would be a second pool of threads."""
    root = Path(torch.__file__).parent
    openmp = [*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]
    return [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", str(openmp[0]) if openmp else "-lgomp"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        error = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
        raise LiaoyuanError(f"The kernels could not be compiled, so the references are used: {error.strip()}")


@functools.cache
def _compiler_version(path: str) -> str:
    result = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace")
    return result.stdout.partition("\n")[0]


def _cpu() -> str:
    """Describe what `-march=native` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    lines = re.findall(r"(?m)^(?:flags|Features|model|cpu family|vendor_id|CPU part)\s*:.*$", text)
    return platform.machine() + "\n".join(sorted(set(lines)))


def _failure_note(target: Path) -> Path:
    return target.with_suffix(".failed")
