"""Code that means harm: it reads nothing, reaches nothing, harms nothing, uses up nothing, and outlives nothing."""

import contextlib
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liaoyuan.safety import Limits, Outcome, printable, run

pytestmark = pytest.mark.usefixtures("jail")
SMALL = Limits(seconds=30, cpu_seconds=2, memory_bytes=256 << 20, output_bytes=64 << 10, file_bytes=1 << 20, files=32)
BEGIN = """
import ctypes, os, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
wrong = []
def refused(what, attack, *arguments):
    try:
        got = attack(*arguments)
    except (OSError, MemoryError, RuntimeError, ImportError, ValueError) as error:
        return error
    wrong.append(f"{what}: {got!r}")
"""
END = "\nprint('held' if not wrong else wrong)\n"


def attack(source: str, limits: Limits = SMALL) -> Outcome:
    return run(BEGIN + source + END, limits=limits)


def assert_held(source: str, limits: Limits = SMALL) -> None:
    outcome = attack(source, limits)
    assert (outcome.status, outcome.output) == ("ended", b"held\n"), outcome


class TestFiles:
    def test_files_of_the_host_are_not_there(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("secret")
        paths = [str(secret), "/etc/passwd", "/etc/shadow", "/root/.ssh", "/home", "/var", "/bin/sh", "/boot", __file__]
        assert_held(f"for path in {paths}: refused(path, os.stat, path)")

    def test_no_link_leads_out(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        assert_held(f"""
os.symlink({str(tmp_path / "secret")!r}, "a"); refused("symlink", open, "a")
os.symlink("../../../../../../etc/passwd", "b"); refused("dots", open, "b")
refused("hard link", os.link, os.__file__, "c")
refused("rename", os.rename, os.__file__, "d")
refused("the root's parent", os.stat, "/../../../etc")
""")

    def test_chroot_and_open_folders_do_not_lead_out(self) -> None:
        assert_held("""
refused("chroot", os.chroot, "/work")
root = os.open("/", os.O_RDONLY)
os.fchdir(root)
for _ in range(50): os.chdir("..")
refused("out", os.stat, "etc")
""")

    def test_nothing_is_written_but_in_its_folder(self) -> None:
        assert_held("""
for path in ("/x", "/library/x", os.__file__, os.path.dirname(os.__file__) + "/x.py", "/dev/x"):
    refused(path, open, path, "w")
refused("chmod", os.chmod, os.__file__, 0o777)
refused("unlink", os.unlink, os.__file__)
open("/work/mine", "w").write("mine")
""")

    def test_a_huge_file_a_sparse_file_and_many_files_end_at_the_limit(self) -> None:
        assert_held("""
refused("huge", lambda: open("huge", "wb").write(bytes(2 << 20)))
refused("sparse", os.truncate, "huge", 1 << 40)
refused("reserved", os.posix_fallocate, os.open("huge", os.O_RDWR), 0, 1 << 40)
def many(make):
    for number in range(100): make(number)
refused("files", many, lambda number: open(f"f{number}", "w").close())
refused("folders", many, lambda number: os.mkdir(f"d{number}"))
""")

    def test_files_together_end_at_the_limit(self) -> None:
        assert_held("""
def fill():
    for number in range(20): open(f"f{number}", "wb").write(bytes(500_000))
refused("all together", fill)
""")

    def test_devices(self) -> None:
        assert_held("""
for name in ("mem", "kmsg", "tty", "ptmx", "fuse", "kvm", "sda", "vda", "shm", "random", "net/tun"):
    refused(name, os.stat, "/dev/" + name)
refused("mknod", os.mknod, "device", 0o20666, os.makedev(1, 1))
refused("fifo", os.mkfifo, "fifo")
if os.listdir("/dev") != ["null"]: wrong.append(os.listdir("/dev"))
""")


class TestOtherProcesses:
    def test_no_other_process_is_seen(self) -> None:
        host = os.getpid()
        assert_held(f"""
refused("proc", os.listdir, "/proc")
refused("sys", os.listdir, "/sys")
refused("host", os.kill, {host}, 0)
if os.getpid() != 2: wrong.append(os.getpid())
""")

    def test_killing_its_parent_everybody_and_the_group_does_nothing(self) -> None:
        assert_held("""
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):
    os.kill(1, number)
os.kill(os.getppid(), signal.SIGKILL)
refused("everybody", os.kill, -1, signal.SIGKILL)
""")

    def test_no_debugger_and_no_memory_of_others(self) -> None:
        assert_held("""
for name in ("ptrace", "process_vm_readv", "process_vm_writev"):
    if getattr(libc, name)(16 if name == "ptrace" else 1, 1, 0, 0, 0, 0) != -1: wrong.append(name)
refused("mem", open, "/proc/1/mem")
""")

    def test_no_process_is_started(self) -> None:
        assert_held("""
import subprocess, multiprocessing
refused("fork", os.fork)
refused("forkpty", os.forkpty)
refused("spawn", os.posix_spawn, "/bin/sh", ["sh"], {})
refused("subprocess", subprocess.run, ["/bin/sh"])
refused("multiprocessing", multiprocessing.get_context("fork").Process(target=print).start)
if libc.vfork() != -1: os._exit(9)
""")

    def test_no_program_is_run(self) -> None:
        assert_held("""
open("program", "w").write("#!/bin/sh\\necho out"); os.chmod("program", 0o6777)
for path in ("program", "/bin/sh", "/proc/self/exe"): refused(path, os.execv, path, [path])
refused("by descriptor", os.execve, os.open("program", os.O_RDONLY), ["x"], {})
refused("memfd", os.memfd_create, "program")
""")

    def test_no_library_of_its_own_is_loaded(self) -> None:
        assert_held("""
import mmap, shutil, math
source = getattr(math, "__file__", None) or __import__("_ctypes").__file__
shutil.copyfile(source, "own.so")
refused("dlopen", ctypes.CDLL, "/work/own.so")
refused("map", lambda: mmap.mmap(os.open("own.so", os.O_RDONLY), 4096, mmap.MAP_PRIVATE, 5))
""")

    def test_a_fork_bomb_ends_at_the_number_of_processes(self) -> None:
        limits = Limits(seconds=30, cpu_seconds=2, memory_bytes=256 << 20, processes=8, threads=0)
        outcome = attack(
            """
children = 0
def bomb():
    global children
    while True:
        if os.fork() == 0: time.sleep(60); os._exit(0)
        children += 1
refused("bomb", bomb)
if children > 12: wrong.append(children)
""",
            limits,
        )
        assert (outcome.status, outcome.output) == ("ended", b"held\n"), outcome
        assert outcome.seconds < 25  # those that sleep were ended with it

    def test_a_daemon_does_not_outlive_the_code(self) -> None:
        limits = Limits(seconds=20, processes=8)
        outcome = attack(
            """
if os.fork() == 0:
    os.setsid() if hasattr(os, "setsid") and not refused("session", lambda: 1 / 1) else None
    if os.fork() == 0:
        for number in range(1, 64):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        time.sleep(3600)
    os._exit(0)
wrong.clear()
""",
            limits,
        )
        assert (outcome.status, outcome.output) == ("ended", b"held\n"), outcome
        assert outcome.seconds < 19  # its output would have stayed open

    def test_threads_end_at_the_limit(self) -> None:
        assert_held("""
count = 0
def bomb():
    global count
    while True:
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start(); count += 1
threading.stack_size(32 << 10)
refused("threads", bomb)
if not 5 < count < 40: wrong.append(count)
""")


class TestNetwork:
    def test_no_socket_of_any_family(self) -> None:
        assert_held("""
for family in range(46):
    for kind in (1, 2, 3, 5):
        refused(f"{family}/{kind}", lambda: socket.socket(family, kind))
refused("name", socket.create_connection, ("127.0.0.1", 80), 1)
refused("resolver", socket.getaddrinfo, "example.org", 80)
""")

    def test_not_even_an_abstract_socket_of_the_host(self) -> None:
        name = f"\0liaoyuan-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as host:
            host.bind(name)
            host.setblocking(False)
            assert_held(f"""
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
refused("sendto", pair[0].sendto, b"out", {name!r})
refused("sendmsg", pair[0].sendmsg, [b"out"], [], 0, {name!r})
refused("connect", pair[0].connect, {name!r})
refused("bind", pair[0].bind, {name!r})
refused("netlink pair", socket.socketpair, 16, 3)
pair[0].send(b"in")
if pair[1].recv(9) != b"in": wrong.append("the pair itself")
""")
            with pytest.raises(BlockingIOError):
                host.recv(9)


class TestTheKernel:
    def test_nobody_becomes_anybody(self) -> None:
        assert_held("""
for change in (os.setuid, os.setgid, os.seteuid, os.setegid): refused(change, change, 0)
refused("groups", os.setgroups, [0])
refused("resuid", os.setresuid, 0, 0, 0)
if 0 in (os.getuid(), os.geteuid(), os.getgid(), os.getegid()): wrong.append("root")
import struct
header, data = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0)), (ctypes.c_uint32 * 6)()
if libc.capget(header, data) or any(data): wrong.append(list(data))
data[0] = data[1] = 0xFFFFFFFF
if libc.capset(header, data) != -1: wrong.append("capset")
""")

    def test_no_mount_and_no_namespace(self) -> None:
        assert_held(
            """
os.mkdir("m")
for what, call in {
    "mount": lambda: libc.mount(b"none", b"m", b"tmpfs", 0, None),
    "proc": lambda: libc.mount(b"proc", b"m", b"proc", 0, None),
    "remount": lambda: libc.mount(None, b"/", None, 32, None),
    "umount": lambda: libc.umount2(b"/work", 2),
    **{f"unshare {bit}": lambda bit=bit: libc.unshare(1 << bit) for bit in (7, 17, 25, 26, 27, 28, 29, 30)},
    "clone": lambda: libc.syscall(CLONE, 0x10000011, 0, 0, 0, 0),
    "setns": lambda: libc.setns(0, 0),
}.items():
    if call() != -1: wrong.append(what)
""".replace("CLONE", "56" if platform.machine() == "x86_64" else "220")
        )

    def test_the_doors_in_which_holes_are_found_are_shut(self) -> None:
        """Every system call that this kernel knows, but those on the list: none is found to exist."""
        known = Path("/usr/include/asm-generic/unistd.h")
        if platform.machine() == "x86_64":
            known = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
        if not known.exists():
            pytest.skip("the kernel's headers, which number the system calls, are not installed")
        words = [line.split() for line in known.read_text().splitlines() if line.startswith("#define __NR_")]
        numbers = {row[1][5:]: int(row[2]) for row in words if len(row) > 2 and row[2].isdigit()}
        doors = """bpf io_uring_setup io_uring_enter keyctl add_key request_key perf_event_open userfaultfd ptrace
            init_module finit_module delete_module kexec_load reboot swapon swapoff syslog acct settimeofday
            clock_settime adjtimex personality iopl ioperm fanotify_init open_by_handle_at name_to_handle_at
            quotactl sync syncfs vmsplice splice tee pidfd_open pidfd_getfd kcmp process_madvise sethostname
            setdomainname memfd_create memfd_secret msgget semget shmget mq_open inotify_init1 mount_setattr
            open_tree move_mount fsopen pivot_root chroot unshare setns seccomp landlock_create_ruleset
            process_vm_readv setrlimit sched_setscheduler sched_setaffinity setpriority ioprio_set mbind
            migrate_pages move_pages set_mempolicy mlock mlockall remap_file_pages modify_ldt lookup_dcookie
            timer_create mknodat setxattr getxattr clone3 execve execveat accept4 connect bind
            listen""".split()  # noqa: SIM905
        calls = {name: numbers[name] for name in doors if name in numbers}
        assert len(calls) > 60
        assert_held(f"""
import errno
for name, number in {calls}.items():
    ctypes.set_errno(0)
    got, error = libc.syscall(number, -1, -1, -1, -1, -1, -1), ctypes.get_errno()
    if got != -1 or error not in (errno.EPERM, errno.ENOSYS): wrong.append((name, got, error))
""")

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="other ways to ask the kernel are those of x86-64")
    def test_system_calls_in_other_ways_end_the_process(self) -> None:
        other = attack("libc.syscall(0x40000000 + 39)")
        assert (other.status, other.exit_code) == ("killed", -signal.SIGSYS)
        old = attack("""
import mmap
page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
""")
        assert old.status == "killed"

    def test_limits_are_not_raised(self) -> None:
        assert_held("""
import resource
for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CORE"):
    refused(name, lambda: resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY,) * 2))
    refused("of its parent", lambda: resource.prlimit(1, getattr(resource, name), (0, 0)))
""")


class TestUsingUp:
    def test_a_memory_bomb_ends_at_the_limit(self) -> None:
        assert_held("""
import mmap
def bomb():
    parts = []
    while True: parts.append(bytearray(8 << 20))
refused("heap", bomb)
def shared():
    parts = []
    while True:
        parts.append(mmap.mmap(-1, 8 << 20)); parts[-1].write(bytes(8 << 20))
refused("shared", shared)
""")
        assert attack("x = []\nwhile True: x.append(' ' * 10**6)").memory_bytes < SMALL.memory_bytes

    def test_a_loop_ends_at_the_cpu_limit(self) -> None:
        limits = Limits(seconds=60, cpu_seconds=1)
        assert attack("while True: pass", limits).status == "cpu"
        stubborn = attack("signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", limits)
        assert stubborn.status == "cpu" and stubborn.cpu_seconds < 4

    def test_sleep_ends_at_the_time_limit_whatever_signals_are_ignored(self) -> None:
        outcome = attack(
            """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1000)
""",
            Limits(seconds=0.5),
        )
        assert outcome.status == "time" and outcome.seconds < 10

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_a_flood_of_output_ends_at_the_limit(self, stream: str) -> None:
        outcome = attack(f"while True: sys.{stream}.write('x' * 9999)")
        assert outcome.status == "output"
        assert len(outcome.output) + len(outcome.errors) <= SMALL.output_bytes

    def test_pipes_and_descriptors_end_at_the_limit(self) -> None:
        assert_held("""
def many():
    while True: os.pipe()
refused("pipes", many)
import fcntl
refused("larger pipes", fcntl.fcntl, 1, 1031, 1 << 20)
""")


class TestWhatItIsGiven:
    def test_no_secret_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIAOYUAN_SECRET", "c0ffee42")
        outcome = attack("""
print(dict(os.environ))
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
names = [environ[0]]
print(names, [value for value in map(str, sys.modules["__main__"].__dict__.values())])
""")
        assert b"c0ffee42" not in outcome.output and b"SECRET" not in outcome.output
        assert outcome.status == "ended", outcome

    def test_nothing_to_read_and_no_terminal(self) -> None:
        assert_held("""
import fcntl, termios
if sys.stdin.read() != "" or os.read(0, 9) != b"": wrong.append("input")
for number in (0, 1, 2):
    refused("push into the terminal", fcntl.ioctl, number, 0x5412, b"x")
refused("terminal", os.open, "/dev/tty", os.O_RDWR)
""")

    def test_no_open_descriptor_beyond_its_three(self) -> None:
        with open(__file__) as file:  # noqa: PTH123 (a descriptor of ours that is open meanwhile)
            os.set_inheritable(file.fileno(), True)
            assert_held("""
for number in range(3, 4096): refused(number, os.fstat, number)
""")

    def test_a_crash_is_an_outcome(self) -> None:
        crash = attack("ctypes.string_at(0)")
        assert (crash.status, crash.exit_code) == ("killed", -signal.SIGSEGV)
        assert attack("sys.stdout.close(); os.abort()").exit_code == -signal.SIGABRT
        assert attack("os._exit(3)").exit_code == 3

    def test_what_it_writes_is_shown_as_visible_characters(self) -> None:
        outcome = attack(
            r"""
os.write(1, b"\x1b[31mred\x1b]0;title\x07\x00\xff\xfe\r\b\xe2\x80\xae line\n")
os.write(2, bytes(range(256)))
"""
        )
        for text in (outcome.output, outcome.errors):
            assert printable(text).isprintable()
        assert printable(outcome.output) == r"\x1b[31mred\x1b]0;title\x07\x00\xff\xfe \x08\u202e line held"
        assert len(printable("x" * 10_000)) == 200


def test_whoever_is_killed_takes_his_jails_with_him() -> None:
    """kill -9 of the process that started a jail: no signal handler helps, the jail sees the hang-up."""
    program = "from liaoyuan.safety import run, Limits\nrun('import time; time.sleep(600)', limits=Limits(seconds=600))"
    owner = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    try:
        the_code = 4  # below the warden, the launcher and process 1
        watched = os.pidfd_open(descendant(owner.pid, the_code))
        owner.kill()
        assert select.select([watched], [], [], 20)[0], "the code still runs"
        os.close(watched)
    finally:
        owner.kill()
        owner.wait()


def descendant(pid: int, depth: int) -> int:
    """Wait for a process to have one so many generations below it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        generation = [pid]
        for _ in range(depth):
            generation = [child for parent in generation for child in children(parent)]
        if generation:
            return generation[0]
    raise AssertionError(f"process {pid} has nobody {depth} generations below it")


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # it is gone already
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
