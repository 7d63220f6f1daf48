"""Compile the C++ kernels for this machine, once, into the user's cache folder.

The library's name is a hash of everything that it depends on (sources, compiler, flags, torch, this CPU), so a
change of any of them compiles anew and an old library is never loaded by mistake. Beside it lies the hash of its bytes:
one that a crash has torn is made again. Objects are kept too, each by a hash of its own text with all that it includes,
so that only what a change touches is compiled for the next library. A failed build leaves its reason there, so that it
is not tried again by every process; what may pass (a killed compiler, a full disk) is tried again after a while.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import TEMPORARY, Progress, Report, silent, write_atomic

NATIVE = Path(__file__).parent / "native"
KERNEL_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math")
BINDING_FLAGS = ("-O1", "-fopenmp", "-DNDEBUG")  # as torch itself is: some of its objects are larger else
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-w")
# These are compiled as one file: torch's headers, which the others do without, cost ten times what they add to them.
WITH_TORCH = (
    *("binding.cpp", "autograd.cpp", "binding_attention.cpp", "binding_experts.cpp", "autograd_experts.cpp"),
    *("binding_inference.cpp", "binding_optimiser.cpp", "binding_loss.cpp", "autograd_loss.cpp"),
    *("binding_rows.cpp", "autograd_rows.cpp", "binding_layer.cpp", "recording.cpp"),
)
IN_THE_TEXT = ("-isystem", "-include", "-D")  # flags whose effect is seen in the preprocessed text
PATIENCE = 600.0  # seconds for which a failure that may pass is not tried again
PASSING = ("Killed signal", "No space left on device", "Disk quota exceeded", "Cannot allocate memory")
LOADS = "import sys, torch; torch.ops.load_library(sys.argv[1])"

_log = logging.getLogger("liaoyuan.ops")


class LibraryError(LiaoyuanError):
    """There is no library; `may_pass`: there may be one if it is tried again later."""

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def build(report: Report = silent) -> Path:
    """Compile the kernels unless this machine has them already, and return the library.

    Raises:
        LiaoyuanError: there is no C++ compiler, or it does not accept the sources, or the cache folder cannot be
            written; the references work without.
    """
    target = library_path()
    if _is_whole(target):
        return target
    with _folder_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and then finds the library
            if not _is_whole(target):
                _build_alone(target, report)
    return target


def find_library() -> Path:
    """Return the library as `build` does, but do not try again what failed before, and say that it takes a while."""
    target = library_path()
    if _is_whole(target):
        return target
    for note, age in ((_note(target), float("inf")), (_note(target, may_pass=True), PATIENCE)):
        with contextlib.suppress(OSError):
            if time.time() - note.stat().st_mtime < age:
                raise LibraryError(note.read_text(encoding="utf-8"))
    _log.warning("Compiling the CPU kernels for this machine, once; it takes some minutes (ahead: liaoyuan ops build).")
    return build()


def cache_folder() -> Path:
    """Return where what is made for this machine is kept. Raises LiaoyuanError if the user has no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME")  # the desktop convention for where caches go
    if cache:
        return Path(cache) / "liaoyuan"
    try:
        return Path.home() / ".cache" / "liaoyuan"
    except RuntimeError:
        raise LibraryError(
            "There is no home folder for compiled kernels, so the slower references are used: set HOME."
        ) from None


def library_path() -> Path:
    """Return where this machine's library is, or will be. Raises LiaoyuanError if there is no compiler."""
    parts = [_compiler_version(compiler()), torch.__version__, str(torch.compiled_with_cxx11_abi()), processor()]
    parts += [*KERNEL_FLAGS, *BINDING_FLAGS, *COMMON_FLAGS]
    for source in sorted(NATIVE.iterdir()):
        parts += [source.name, source.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    return cache_folder() / "kernels" / f"{digest}.so"


def compiler() -> str:
    """Return the path of the C++ compiler."""
    found = shutil.which("g++") or shutil.which("c++")
    if not found:
        raise LibraryError("There is no C++ compiler (g++), so the slower references are used.")
    return found


def _build_alone(target: Path, report: Report) -> None:
    """Compile while no other process does; leave the library and its hash, or the reason why there is none."""
    for torn in target.parent.glob(f"{TEMPORARY}*"):  # of a process that was killed
        shutil.rmtree(torn, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=TEMPORARY) as folder:
            library = _compiled(Path(folder), report)
            _try(library)
            write_atomic(_hash_of(target), _hash(library))
            library.replace(target)
    except LibraryError as error:
        with contextlib.suppress(LiaoyuanError):  # a full disk has no room for a note either
            write_atomic(_note(target, error.may_pass), str(error))
        raise
    report(Progress(1, 1, "file", "compiling kernels"))


def _compiled(folder: Path, report: Report) -> Path:
    commands = [bindings_command(), *map(kernel_command, kernel_sources())]  # the longest first
    objects = list[Path]()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            for made in pool.map(functools.partial(object_of, folder=folder), commands):
                objects.append(made)
                report(Progress(len(objects), len(commands) + 1, "file", "compiling kernels"))
        except LibraryError:
            pool.shutdown(cancel_futures=True)
            raise
    return link(objects, folder / "kernels.so")


def kernel_sources() -> list[Path]:
    """Return the files that are compiled each alone, for a machine."""
    return [source for source in sorted(NATIVE.glob("*.cpp")) if source.name not in WITH_TORCH]


def kernel_command(source: Path, machine: Sequence[str] = ("-march=native",)) -> list[str]:
    """Return how a kernel is compiled for a machine, this one if none is named."""
    return [compiler(), *COMMON_FLAGS, *KERNEL_FLAGS, *machine, str(source)]


def bindings_command() -> list[str]:
    """Return how what calls the kernels from torch is compiled: for all machines alike."""
    include = Path(torch.__file__).parent / "include"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}", abi]
    *others, last = (str(NATIVE / name) for name in WITH_TORCH)
    flags += [word for other in others for word in ("-include", other)]
    return [compiler(), *COMMON_FLAGS, *BINDING_FLAGS, *flags, last]


def object_of(command: Sequence[str], folder: Path) -> Path:
    """Return what a command compiles: kept from before, if its flags and the preprocessed text are the same, or made
    now and kept; in `folder`, if it cannot be kept.
    """
    flags = [word for word in command if word.startswith("-") and not word.startswith(IN_THE_TEXT)]
    parts = [_compiler_version(command[0]), processor(), *flags, run([*command, "-E", "-P"])]
    name = f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.o"
    kept, made = cache_folder() / "kernels" / "objects" / name, folder / name
    if kept.exists():
        return kept
    run([*command, "-c", "-o", str(made)])
    with contextlib.suppress(LiaoyuanError):
        write_atomic(kept, made.read_bytes())
        return kept
    return made


def link(objects: Sequence[Path], library: Path) -> Path:
    """Make one library of what was compiled."""
    run([compiler(), "-shared", *map(str, objects), *_libraries(), "-o", str(library)])
    return library


def _try(library: Path) -> None:
    """Load a new library in a process of its own: one that is torn could take this one with it."""
    if not sys.executable:
        return
    result = subprocess.run(
        [sys.executable, "-c", LOADS, str(library)], capture_output=True, text=True, errors="replace"
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"signal {-result.returncode}"])[-1]
        raise LibraryError(f"The compiled kernels cannot be loaded, so the references are used: {reason}")


def _is_whole(target: Path) -> bool:
    """Return whether the library is there, with the bytes that it had when it was made."""
    try:
        return _hash(target) == _hash_of(target).read_text(encoding="utf-8")
    except OSError:
        return False


def _hash(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _hash_of(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _libraries() -> list[str]:
    """Name torch's own libraries, and its own OpenMP runtime: a second one would be a second pool of threads."""
    root = Path(torch.__file__).parent
    openmp = [*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]
    return [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", str(openmp[0]) if openmp else "-lgomp"]


def run(command: list[str]) -> str:
    """Run a command of the compiler and return what it prints. Raises LibraryError with its reason."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if not result.returncode:
        return result.stdout
    lines = result.stderr.strip().splitlines()
    if result.returncode < 0:
        lines.append(f"{Path(command[0]).name} was killed by signal {-result.returncode}")
    told = next((line for line in lines if any(sign in line for sign in PASSING)), None)
    error = told or next((line for line in lines if "error" in line), lines[-1] if lines else "no reason was given")
    raise LibraryError(
        f"The kernels could not be compiled, so the references are used: {error.strip()[:300]}",
        may_pass=told is not None or result.returncode < 0,
    )


@contextlib.contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LibraryError(
            f"Compiled kernels cannot be kept in {folder} ({error.strerror or error}), so the slower references are "
            "used. Set XDG_CACHE_HOME to a folder that can be written."
        ) from error


@functools.cache
def _compiler_version(path: str) -> str:
    result = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace")
    return result.stdout.partition("\n")[0]


def processor() -> str:
    """Return what `-march=native` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    lines = re.findall(r"(?m)^(?:flags|Features|model|cpu family|vendor_id|CPU part)\s*:.*$", text)
    return platform.machine() + "\n".join(sorted(set(lines)))


def _note(target: Path, may_pass: bool = False) -> Path:
    """Return where the reason stands why there is no library."""
    return target.with_suffix(".interrupted" if may_pass else ".failed")
