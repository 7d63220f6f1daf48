"""The jail runs what is harmless as Python would, many at once and quickly; where it is not whole it runs nothing."""

import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liaoyuan import safety
from liaoyuan.errors import LiaoyuanError
from liaoyuan.safety import Job, Limits, Mechanism, run, run_all
from liaoyuan.safety.jail import start
from liaoyuan.safety.mechanisms import REMEDIES
from liaoyuan.safety.seccomp import ALLOWED, CONDITIONAL, MACHINES, filter_program, numbers
from liaoyuan.safety.warden import WARDEN

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.mark.usefixtures("jail")
class TestRunning:
    def test_output_errors_files_and_exit_code_are_those_of_python(self) -> None:
        files = {"data/words.txt": b"one two", "own.py": b"def count(text): return len(text.split())"}
        outcome = run("import own, sys\nprint(own.count(open('data/words.txt').read()))\nsys.exit('bad')", files)
        assert (outcome.status, outcome.exit_code) == ("ended", 1)
        assert (outcome.output, outcome.errors) == (b"2\n", b"bad\n")
        assert run("raise SystemExit(7)").exit_code == 7
        assert run("import atexit; atexit.register(print, 'bye'); print('hello')").output == b"hello\nbye\n"
        assert run("import threading, time; threading.Thread(target=print, args=('late',)).start()").output == b"late\n"

    def test_a_traceback_begins_with_the_code(self) -> None:
        errors = run("def f():\n    return 1 / 0\n\nf()\n").errors.decode()
        assert errors.splitlines()[1].endswith('File "main.py", line 4, in <module>')
        assert errors.splitlines()[-1] == "ZeroDivisionError: division by zero"

    def test_the_whole_standard_library_is_there_and_nothing_else(self) -> None:
        modules = "asyncio bz2 ctypes csv decimal hashlib json lzma re sqlite3 ssl statistics tempfile typing uuid zlib"
        found = run(f"import {', '.join(modules.split())}\nprint(asyncio.run(asyncio.sleep(0, 'done')), ctypes.CDLL)")
        assert found.is_well, found
        for name in ("torch", "numpy", "pytest"):
            assert b"ModuleNotFoundError" in run(f"import {name}").errors

    def test_the_same_code_ends_in_the_same_way(self) -> None:
        program = "print(hash('text'), list({'a', 'b', 'c', 'd'}), __import__('random').Random(3).random())"
        assert len({run(program).output for _ in range(3)}) == 1

    def test_one_run_leaves_nothing_for_the_next(self) -> None:
        run("open('left', 'w').write('x'); import json; json.left = 1; import builtins; builtins.left = 1")
        outcome = run(
            "import os, json, builtins\nprint(os.listdir(), hasattr(json, 'left'), hasattr(builtins, 'left'))"
        )
        assert outcome.output == b"['main.py'] False False\n"

    def test_many_run_at_once_and_keep_their_order(self) -> None:
        outcomes = run_all([Job(f"print({number})") for number in range(24)])
        assert [int(outcome.output) for outcome in outcomes] == list(range(24))

    def test_it_takes_little_processor_time(self) -> None:
        run("")
        before = time.process_time()
        cpu = [run("print(sum(range(1000)))").cpu_seconds for _ in range(5)]
        assert time.process_time() - before < 0.25 and min(cpu) < 0.05  # measured: 1 ms and 3 ms a run

    def test_limits_and_files_that_cannot_be_are_refused(self) -> None:
        with pytest.raises(LiaoyuanError, match="limit seconds of a jail must be above nought"):
            Limits(seconds=0)
        with pytest.raises(LiaoyuanError, match="do not fit in a jail"):
            run("", {"large": bytes(1 << 20)}, Limits(file_bytes=1 << 20))
        with pytest.raises(LiaoyuanError, match="do not fit in a jail"):
            run("", {str(number): b"" for number in range(20)}, Limits(files=10))

    def test_when_the_process_that_makes_jails_is_killed_the_next_run_has_another(self) -> None:
        assert run("print(1)").is_well and WARDEN.process is not None
        WARDEN.process.kill()
        WARDEN.process.wait()
        assert run("print(2)").output == b"2\n"

    @pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "main.py", "a\0b"])
    def test_a_file_that_leads_out_is_refused(self, name: str) -> None:
        with pytest.raises(LiaoyuanError, match="no name for a file in a jail"):
            run("", {name: b""})

    def test_no_process_and_no_descriptor_is_left(self) -> None:
        run("")
        before = len(list(Path("/proc/self/fd").iterdir()))
        for source in ("print(1)", "1 / 0", "import os; os.abort()", "while True: print('x' * 10_000)"):
            run(source)
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    def test_whoever_is_no_root_has_the_same_jail(self, tmp_path: Path) -> None:
        python = next((path for path in ("/usr/bin/python3", sys.executable) if usable_by_all(path)), None)
        if os.geteuid() != 0 or python is None:
            pytest.skip("needs root, to become somebody else, and a Python of 3.11 or newer that all may run")
        shutil.copytree(Path(SOURCE) / "liaoyuan" / "safety", tmp_path / "liaoyuan" / "safety")
        for name in ("errors.py", "__init__.py"):
            shutil.copy(Path(SOURCE) / "liaoyuan" / name, tmp_path / "liaoyuan" / name)
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == os.getuid() and str(folder).startswith("/tmp/"):
                folder.chmod(0o755)
        program = (
            "from liaoyuan import safety\nprint(safety.lacking() or safety.run('import os; print(os.getuid())').output)"
        )
        found = subprocess.run(
            [python, "-c", program], env={"PYTHONPATH": str(tmp_path)}, user=12345, group=12345, extra_groups=[],
            capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        if found.stdout.startswith("the jail lacks its part 'user namespace'"):
            pytest.skip(f"NOT RUN: {found.stdout}")
        assert found.stdout == "b'1000\\n'\n", found


def usable_by_all(path: str) -> bool:
    """Whether an ordinary user may start this Python, and it is new enough."""
    try:
        found = subprocess.run(
            [path, "-c", "import sys; print(sys.version_info >= (3, 11))"], user=12345, capture_output=True
        )
    except (OSError, PermissionError):
        return False
    return found.stdout == b"True\n"


class TestRefusing:
    """Where a mechanism lacks, nothing runs, and a sentence says which and what to do."""

    def test_a_host_without_user_namespaces(self) -> None:
        """A user namespace in which no other may be made, and whose root is nobody outside."""
        if safety.lacking():
            pytest.skip(f"NOT RUN: {safety.lacking()}")
        program = f"""
import ctypes, os, sys
sys.path.insert(0, {SOURCE!r})
user, group = os.getuid(), os.getgid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
for name, text in (("setgroups", "deny"), ("gid_map", f"0 {{group}} 1"), ("uid_map", f"0 {{user}} 1")):
    open(f"/proc/self/{{name}}", "w").write(text)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
from liaoyuan import safety
from liaoyuan.errors import LiaoyuanError
print([mechanism.name for mechanism in safety.mechanisms() if mechanism.why not in ("", "not tried")])
print(safety.lacking())
tests = safety.Tests(("assert True",))
for attempt in (safety.require, lambda: safety.run("print('it ran')"), lambda: safety.try_code("", tests)):
    try: print(attempt())
    except LiaoyuanError as error: print("refused:", error)
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        lines = found.stdout.splitlines()
        assert lines[0] == "['user namespace']", found
        assert (
            lines[1].startswith("the jail lacks its part 'user namespace' here (No space left") and "sysctl" in lines[1]
        )
        assert len(lines) == 5 and all(line.startswith("refused: Untrusted code is not run") for line in lines[2:])

    def test_another_system_or_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        with pytest.raises(LiaoyuanError, match="lacks its part 'linux'"):
            start(Job("print(1)"))
        safety.mechanisms.cache_clear()
        try:
            assert safety.mechanisms()[0] == Mechanism("linux", False, "this is Darwin")
            assert (
                safety.lacking() == "the jail lacks its part 'linux' here (this is Darwin). Run code rewards on Linux."
            )
            monkeypatch.undo()
            monkeypatch.setattr(platform, "machine", lambda: "riscv64")
            safety.mechanisms.cache_clear()
            assert "this is riscv64" in safety.lacking()
        finally:
            safety.mechanisms.cache_clear()

    def test_a_kernel_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "release", lambda: "5.10.0-28-amd64")
        safety.mechanisms.cache_clear()
        try:
            assert "Use Linux 5.14 or newer" in safety.lacking()
        finally:
            safety.mechanisms.cache_clear()

    def test_every_mechanism_has_a_remedy(self) -> None:
        assert [mechanism.name for mechanism in safety.mechanisms()] == list(REMEDIES)


class TestFilter:
    """The program that the kernel runs at each system call, run here instead, for both processors."""

    @pytest.mark.parametrize("machine", MACHINES)
    def test_what_is_on_the_list_is_allowed_and_all_else_refused(self, machine: str) -> None:
        allowed = set(numbers(ALLOWED, machine).values())
        special = set(numbers(CONDITIONAL, machine).values())
        for number in range(600):
            wanted = ALLOW if number in allowed else EPERM
            if number not in special:
                assert decide(machine, number) == wanted, number

    @pytest.mark.parametrize("machine", MACHINES)
    def test_what_depends_on_its_arguments(self, machine: str) -> None:
        known = numbers(CONDITIONAL, machine)
        thread = 0x3D0F00  # as the C library makes one
        for name, arguments, wanted in (
            ("clone", [thread], ALLOW),
            ("clone", [17], EPERM),
            ("clone", [thread | 0x10000000], EPERM),
            ("clone3", [0], ENOSYS),
            ("socketpair", [1], ALLOW),
            ("socketpair", [16], EPERM),
            ("sendto", [3, 0, 0, 0, 0], ALLOW),
            ("sendto", [3, 0, 0, 0, 1], EPERM),
            ("sendto", [3, 0, 0, 0, 1 << 40], EPERM),
            ("ioctl", [0, 0x5401], ALLOW),
            ("ioctl", [0, 0x5412], EPERM),
            ("fcntl", [0, 3], ALLOW),
            ("fcntl", [0, 1031], EPERM),
            ("prctl", [15], ALLOW),
            ("prctl", [22], EPERM),
            ("prlimit64", [0, 7, 0], ALLOW),
            ("prlimit64", [0, 7, 1 << 33], EPERM),
        ):
            assert decide(machine, known[name], arguments) == wanted, (name, arguments)
        assert decide(machine, known["clone"], [17], processes=8) == ALLOW
        assert decide(machine, known["clone"], [17 | 0x40000000], processes=8) == EPERM

    def test_another_kind_of_system_call_kills(self) -> None:
        assert decide("x86_64", 0, architecture=0x40000003) == KILL  # i386
        assert decide("x86_64", 0x40000000) == KILL  # x32
        assert decide("aarch64", 0, architecture=0x40000028) == KILL  # 32-bit ARM

    @pytest.mark.parametrize("machine", MACHINES)
    def test_the_numbers_are_those_of_the_kernels_headers(self, machine: str) -> None:
        if not HEADERS[machine].exists():
            pytest.skip(f"{HEADERS[machine]} is not installed")
        known: dict[str, int] = {}
        for line in HEADERS[machine].read_text().splitlines():
            words = line.split()
            if len(words) > 2 and words[0] == "#define" and words[1].startswith("__NR") and words[2].isdigit():
                known.setdefault(words[1].removeprefix("__NR3264_").removeprefix("__NR_"), int(words[2]))
        found = {**numbers(ALLOWED, machine), **numbers(CONDITIONAL, machine)}
        assert {name: number for name, number in found.items() if known.get(name, number) != number} == {}
        assert len(found.keys() & known.keys()) > 100


def decide(
    machine: str, number: int, arguments: tuple[int, ...] | list[int] = (), architecture: int = 0, processes: int = 1
) -> int:
    """Run the filter as the kernel would (linux/bpf_common.h) and return what it says."""
    data = struct.pack("=iIQ", number, architecture or MACHINES[machine], 0)
    data += struct.pack("=6Q", *arguments, *[0] * (6 - len(arguments)))
    program = list(struct.iter_unpack("=HBBI", filter_program(machine, processes)))
    place, value = 0, 0
    while True:
        code, yes, no, operand = program[place]
        place += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif code == 0x06:
            return operand
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            place += yes if holds else no
