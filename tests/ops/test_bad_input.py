"""Where kernels cannot be had the references take over, and one line says so: compilers that fail, folders that
cannot be written, torn libraries, devices and dtypes without kernels.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from liaoyuan import ops
from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.build import _compiler_version, _hash_of, cache_folder, compiler, kernel_sources, library_path
from tests.conftest import slow_if
from tests.ops.fresh import Fresh

STATUS = """
import torch
from liaoyuan import ops
ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
print(*{s.kernel for s in ops.status()})
"""
ONE = "from liaoyuan.ops.choice import kernel_in_use; print(kernel_in_use('rms_norm', 'cpu'))"  # as all in a library
COMMAND = "from liaoyuan.cli.main import main; main()"
FILES = len(kernel_sources()) + 1  # the kernels, and all that calls them from torch as one
# Like g++ as far as `build` sees: {compile} and {link} do their work with the path of the output in $out.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then {version}; exit; fi
case " $* " in *" -E "*) echo "$*"; exit ;; esac
while [ "$1" != -o ]; do shift; done
out="$2"; echo "$out" >> {folder}/calls
case "$out" in
*kernels.so) {link} ;;
*) {compile} ;;
esac
"""


@pytest.fixture
def native_only() -> None:
    if any(row.kernel != "native" for row in ops.status()):
        pytest.skip("no native kernels here")


def place_compiler(
    folder: Path, compile: str = ': > "$out"', link: str = ': > "$out"', version: str = "echo 1"
) -> Path:
    """Write a false g++; return the folder of its call list."""
    program = folder / "bin" / "g++"
    program.parent.mkdir(exist_ok=True)
    text = COMPILER.format(folder=folder, compile=compile, link=link, version=version)
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)
    return folder


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def environment(folder: Path, **more: str) -> dict[str, str]:
    own = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


def run(folder: Path, script: str = STATUS, *arguments: str, **more: str) -> tuple[str, list[str]]:
    """Run a script with the false compiler; return what it prints, and the lines that say that references are used."""
    with Fresh(script, *arguments, environment=environment(folder, **more)) as process:
        code, out, err = process.ended()
    assert code == 0, err
    return out, [line for line in err.splitlines() if "references" in line]


def only_line(folder: Path) -> str:
    kernels, lines = run(folder)
    assert kernels.split() == ["reference"]
    assert len(lines) == 1
    return lines[0]


def test_doctor_says_once_why_there_are_no_kernels(tmp_path: Path) -> None:
    """A compiler that dies half-way: the others' files are not tried, nor is it tried a second time."""
    place_compiler(
        tmp_path,
        f': > "$out"; [ $(wc -l < {tmp_path}/calls) -lt 3 ] || {{ echo "a.cpp:1: error: too old" >&2; exit 1; }}',
    )
    table, lines = run(tmp_path, COMMAND, "doctor", "ops", COLUMNS="200")
    assert len(lines) == 1 and "too old" in lines[0]
    assert table.count("too old") == 1 and table.count(" reference ") == len(ops.status())
    tried = calls(tmp_path)
    assert tried < FILES
    assert "too old" in only_line(tmp_path)
    assert calls(tmp_path) == tried
    assert not list((tmp_path / "cache").rglob(".part-*"))


def test_a_killed_compiler_is_tried_again_after_a_while(tmp_path: Path) -> None:
    place_compiler(tmp_path, "kill -9 $$")
    assert "killed by signal 9" in only_line(tmp_path)
    tried = calls(tmp_path)
    assert "killed by signal 9" in only_line(tmp_path)
    assert calls(tmp_path) == tried
    (note,) = (tmp_path / "cache").rglob("*.interrupted")
    os.utime(note, (0, 0))
    assert "killed by signal 9" in only_line(tmp_path)
    assert calls(tmp_path) > tried


@pytest.mark.parametrize("torn", [slow_if(True, ""), "head -c 100000 {library}", slow_if(True, "echo made")])
def test_a_torn_library_is_not_loaded(torn: str, tmp_path: Path, native_only: None) -> None:
    place_compiler(tmp_path, link=f'{torn.format(library=library_path()) or ":"} > "$out"')
    assert "cannot be loaded" in only_line(tmp_path)


@pytest.fixture
def copier(tmp_path: Path, native_only: None) -> Iterator[Path]:
    """A compiler that says that it is the real one, whose library is the real one. It calls no other compiler."""
    version = _compiler_version(compiler())
    yield place_compiler(tmp_path, link=f'cp {library_path()} "$out"', version=f"echo '{version}'")


def test_a_library_that_was_torn_later_is_made_again(copier: Path) -> None:
    """Of what was compiled for it, which is whole."""
    for done in (1, 2):
        assert run(copier, ONE) == ("native\n", [])
        assert calls(copier) == FILES + done
        (library,) = (copier / "cache").rglob("*.so")
        os.truncate(library, library.stat().st_size // 2)


def test_kernels_are_built_ahead_and_a_folder_that_cannot_be_written_is_no_matter_then(copier: Path) -> None:
    said, _ = run(copier, COMMAND, "ops", "build")
    (library,) = (copier / "cache").rglob("*.so")
    assert said == f"The CPU kernels are in {library}.\n"
    (library.parent / "lock").unlink()
    (library.parent / "lock").mkdir()  # so that even root cannot open it
    assert run(copier, ONE) == ("native\n", [])


def test_processes_that_build_at_once_compile_once(copier: Path) -> None:
    """The second process waits for the lock and finds what the first one made; leftovers of a killed one are gone."""
    leftover = copier / "cache" / "liaoyuan" / "kernels" / ".part-killed"
    leftover.mkdir(parents=True)
    with Fresh(ONE, environment=environment(copier)) as one, Fresh(ONE, environment=environment(copier)) as other:
        assert [process.ended()[:2] for process in (one, other)] == [(0, "native\n")] * 2
    assert calls(copier) == FILES + 1
    assert not leftover.exists()


def test_a_cache_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    place_compiler(tmp_path)
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    said = only_line(tmp_path)
    assert str(tmp_path / "cache") in said and "Set XDG_CACHE_HOME" in said


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    place_compiler(tmp_path, 'head -c 30000 /dev/zero > "$out" || exit 1')
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(cache)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        assert "No space left on device" in only_line(tmp_path)
        assert not list(cache.rglob(".part-*"))
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(LiaoyuanError, match="set HOME"):
        cache_folder()


def test_home_may_be_unset(tmp_path: Path) -> None:
    """The user's entry in the password file says where it is."""
    place_compiler(tmp_path, "exit 1")
    where = {k: v for k, v in environment(tmp_path).items() if k not in ("HOME", "XDG_CACHE_HOME")}
    with Fresh("from liaoyuan.ops.build import cache_folder; print(cache_folder())", environment=where) as process:
        code, out, err = process.ended()
    assert code == 0 or "set HOME" in err
    assert "liaoyuan" in out + err


def test_another_cpu_has_another_library(monkeypatch: pytest.MonkeyPatch, native_only: None) -> None:
    """A home folder may be shared by machines of several kinds."""
    build = sys.modules["liaoyuan.ops.build"]
    here = library_path()
    monkeypatch.setattr(build, "processor", lambda: "x86_64 flags : sse2")
    assert library_path() != here and library_path().parent == here.parent
    assert _hash_of(here).exists()


WORKER = """
import os, sys
from liaoyuan.cli import worker
from liaoyuan import ops
worker.run_verb = lambda: ops.status() and None
sys.argv = ["worker", sys.argv[1], str(os.getppid()), "verb"]
worker.main()
"""


def test_the_processes_of_a_host_say_it_once(tmp_path: Path) -> None:
    said = []
    for rank in ("0", "1"):
        said += run(tmp_path, WORKER, str(tmp_path), RANK=rank, LOCAL_RANK=rank, PATH=str(tmp_path))[1]
    assert len(said) == 1


OTHERS = """
import torch
from liaoyuan import ops
x = torch.randn(4, 8)
for dtype in (torch.float16, torch.float64):
    for _ in range(2):
        ops.swiglu(x.to(dtype))
        ops.rms_norm(x.to(dtype), torch.ones(8, dtype=dtype), 1e-6)
print(*{s.kernel + ": " + s.reason for s in ops.status("xpu")})
"""


def test_dtypes_and_devices_without_kernels_are_said_once(tmp_path: Path, native_only: None) -> None:
    out, lines = run(tmp_path, OTHERS, XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", ""), PATH=os.environ["PATH"])
    assert out.strip() == "reference: no kernel for xpu yet"
    assert [line.partition(":")[0] for line in lines] == [
        *["The kernels for cpu take float32 and bfloat16"] * 2,
        "No operator has a kernel for xpu yet",
    ]
    assert [dtype in line for dtype, line in zip(("float16", "float64", "xpu"), lines, strict=True)] == [True] * 3
