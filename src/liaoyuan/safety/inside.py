"""The program that makes jails: it waits for orders, and each gets a process that makes a jail around itself.

It imports once what jails often need and is forked for each, so that none waits for an interpreter to start; no code of
strangers ever runs in the process that is forked. Then three processes make a jail. The launcher stays outside, keeps
the time and tells how it ended. Its child is process 1 of the jail: it makes the file system, gives up every privilege
and waits. The code is process 2, with limits and the filter on top. Of this package only `apart` is imported.

Each step names the mechanism that it needs; the first one that fails is reported, and nothing runs.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn

NEW_MOUNT, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000  # linux/sched.h
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096  # linux/mount.h
RECURSIVE, PRIVATE, NO_ATIME, NO_DIR_ATIME, RELATIVE_ATIME = 16384, 1 << 18, 1024, 2048, 1 << 21
DETACH = 2
DEATH_SIGNAL, DUMPABLE, SET_SECCOMP, READ_BOUND, DROP_BOUND, NO_NEW_PRIVILEGES, AMBIENT = 1, 4, 22, 23, 24, 38, 47
CLEAR_AMBIENT, FILTER_MODE = 4, 2  # linux/prctl.h, as the line above
CAPABILITY_VERSION = 0x20080522  # linux/capability.h, version 3: 64 bits
NEEDED_OF_ROOT = (6, 7, 8, 21)  # SETGID, SETUID, SETPCAP, SYS_ADMIN
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
KEPT = 16  # the first descriptor above those that the code gets
INSIDE_ID = 1000  # the user in the jail, where a user namespace gives him his number
MOUNT_POINT = "/sys"  # covered in the jail's own mount namespace: nothing that is bound lies there
SET_UP_SECONDS = 20.0
STARTED = b'{"started": true}\n'
ROOT_BYTES, ROOT_FILES = 1 << 20, 1024  # of the file system that holds only mount points

PRELOADED = """bisect collections copy datetime decimal fractions functools heapq itertools math operator random re
    string threading traceback unittest liaoyuan.safety.apart.judge liaoyuan.safety.apart.server""".split()  # noqa: SIM905
MOST_DESCRIPTORS = 8  # of an order: the job, output, errors, the status, a channel

libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(Exception):
    """A mechanism that this host does not give: its name, and why."""


def demand(mechanism: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `call` returns; raises RefusedError in the name of the mechanism if it fails."""
    try:
        result = call(*arguments)
    except OSError as error:
        raise RefusedError(mechanism, f"{error.strerror} ({error.filename or getattr(call, '__name__', '')})") from None
    if isinstance(result, int) and result == -1:  # so functions of libc say it
        raise RefusedError(mechanism, f"{os.strerror(ctypes.get_errno())} ({getattr(call, '__name__', '')})")
    return result


def serve(orders: socket.socket, folder: str) -> None:
    """Make a jail for each order until the other side is gone. An order is the descriptors of a job."""
    preload(folder)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are reaped by the kernel
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, 1, MOST_DESCRIPTORS)
        if not message:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            orders.close()
            os.setsid()
            for place, descriptor in enumerate(descriptors[:3]):
                os.dup2(descriptor, place)
                os.close(descriptor)
            launch(descriptors[3], descriptors[4:])
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def preload(folder: str) -> None:
    """Import what jails often need; of this package `apart` alone, found in its folder."""
    for name, path in (("liaoyuan", []), ("liaoyuan.safety", [folder])):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = path
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what all share is not touched again


def read_exactly(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_job() -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read from standard input what is to be run: a header as JSON, and the files."""
    (length,) = struct.unpack(">I", read_exactly(0, 4))
    job = json.loads(read_exactly(0, length))
    return job, {name: read_exactly(0, size) for name, size in job["files"]}


def launch(status: int, channel: list[int]) -> None:
    """The launcher: separate users and processes, start process 1, watch it, and tell how it ended."""
    job, files = read_job()
    try:
        identity = leave_users()
        demand("pid namespace", libc.unshare, NEW_PID)
        reports, report = os.pipe()
        init = demand("pid namespace", os.fork)
        if init == 0:
            os.close(reports)
            os.close(status)
            be_init(job, files, identity, report, channel)
        os.close(report)
        for descriptor in (1, 2, *channel):
            os.close(descriptor)
        tell(status, watch(init, reports, status, job["limits"]["seconds"]))
    except RefusedError as error:
        tell(status, {"refused": error.args[0], "why": error.args[1]})


def tell(descriptor: int, message: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(message).encode() + b"\n")


def leave_users() -> tuple[int, int] | None:
    """Enter a user namespace as an ordinary user; as root return the unused user and group to become later.

    A root with all that is needed uses no user namespace: its user is one that nobody else is, so that limits per user
    are limits per jail.
    """
    spare = spare_id()
    if os.geteuid() == 0:
        if spare is not None and has_capabilities(NEEDED_OF_ROOT):
            return spare, spare
        if spare is not None and has_capabilities((6, 7)):  # a root of a container: limits do not bind the real root
            become(spare, spare)
    user, group = os.geteuid(), os.getegid()
    if user == 0 and spare is not None:
        raise RefusedError("user namespace", "root without the right to become another user: no limit would bind it")
    demand("user namespace", libc.unshare, NEW_USER)
    for name, text in (
        ("setgroups", "deny"),
        ("gid_map", f"{INSIDE_ID} {group} 1"),
        ("uid_map", f"{INSIDE_ID} {user} 1"),
    ):
        demand("user namespace", write_text, f"/proc/self/{name}", text)
    return None


def write_text(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def spare_id() -> int | None:
    """Return a number that is hardly anybody's, as user and as group, of those that this user namespace has."""
    with open("/proc/self/uid_map", encoding="ascii") as users, open("/proc/self/gid_map", encoding="ascii") as groups:
        last = min(max(int(row.split()[0]) + int(row.split()[2]) for row in file) for file in (users, groups))
    if last <= 60_000:
        return None
    low, high = (1 << 30, 1 << 31) if last >= 1 << 31 else (60_000, last)
    return random.SystemRandom().randrange(low, high)


class CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def capabilities() -> tuple[int, int, int]:
    """Return the effective, permitted and inheritable capabilities as sets of bits."""
    header, data = CapabilityHeader(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    demand("capabilities", libc.capget, ctypes.byref(header), data)
    low, high = data[:3], data[3:]
    return tuple(first | second << 32 for first, second in zip(low, high, strict=True))  # type: ignore[return-value]


def has_capabilities(numbers: tuple[int, ...]) -> bool:
    return all(capabilities()[0] >> number & 1 for number in numbers)


def become(user: int, group: int) -> None:
    demand("capabilities", os.setgroups, [])
    demand("capabilities", os.setresgid, group, group, group)
    demand("capabilities", os.setresuid, user, user, user)
    libc.prctl(DUMPABLE, 1, 0, 0, 0)  # else /proc/self stays root's, and no map can be written


def watch(init: int, reports: int, status: int, seconds: float) -> dict[str, Any]:
    """Wait until the jail is over: by itself, at the time limit, or because the other side is gone."""
    poll = select.poll()
    poll.register(reports, select.POLLIN)
    poll.register(0, 0)  # hang-up alone
    end, kind, buffer, started = time.monotonic() + SET_UP_SECONDS, "time", b"", False
    while True:
        events = dict(poll.poll(max(0.0, end - time.monotonic()) * 1000))
        if reports in events:
            part = os.read(reports, 1 << 16)
            buffer += part
            if not part:
                kind = "ended"
                break
            if STARTED in buffer and not started:
                end, started = time.monotonic() + seconds, True
        elif 0 in events:
            kind = "given up"
            break
        elif time.monotonic() >= end:
            break
    os.kill(init, signal.SIGKILL)
    used = os.wait4(init, 0)[2]  # returns when every process of the jail is gone
    found: dict[str, Any] = {"end": kind, "started": started, "cpu": used.ru_utime + used.ru_stime}
    for line in buffer.splitlines():
        found |= json.loads(line)
    return found


def be_init(
    job: dict[str, Any], files: dict[str, bytes], identity: tuple[int, int] | None, report: int, channel: list[int]
) -> NoReturn:
    """Process 1: make the jail, start the code, wait for it, report. With its end the kernel kills all that is left."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a signal without a handler cannot reach process 1 from inside
        separate()
        make_root(job, identity or (INSIDE_ID, INSIDE_ID))
        drop_privileges(identity)
        demand("death with its parent", libc.prctl, DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        place(files)
        program = demand("seccomp", bytes.fromhex, job["filter"])
        child = demand("pid namespace", os.fork)
        if child == 0:
            be_code(job, files, report, channel, program)
        os.write(report, STARTED)
        _, wait_status = wait_for(child)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
        tell(report, {"code": os.waitstatus_to_exitcode(wait_status), "cpu": cpu, "memory": memory})
    except RefusedError as error:
        tell(report, {"refused": error.args[0], "why": error.args[1]})
    except BaseException as error:
        tell(report, {"refused": "jail", "why": repr(error)})
    finally:
        os._exit(0)


def wait_for(child: int) -> tuple[int, int]:
    """Wait for one child; others, which its own end left behind, are reaped on the way."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return pid, status


def separate() -> None:
    """Leave the host's mounts, network, messages, names and control groups."""
    for name, flag in (
        ("mount namespace", NEW_MOUNT),
        ("network namespace", NEW_NET),
        ("ipc namespace", NEW_IPC),
        ("uts namespace", NEW_UTS),
        ("cgroup namespace", NEW_CGROUP),
    ):
        demand(name, libc.unshare, flag)
    demand("uts namespace", libc.sethostname, b"jail", 4)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = (text.encode() if text is not None else None for text in (source, target, kind))
    first, second, third = encoded
    if libc.mount(first, second, third, ctypes.c_ulong(flags), options.encode() if options else None):
        number = ctypes.get_errno()
        raise RefusedError("mounts", f"mount of {kind or source or 'the root'} at {target}: {os.strerror(number)}")


def make_root(job: dict[str, Any], owner: tuple[int, int]) -> None:
    """Make a root of nothing but Python's library, the folder /work and /dev/null, and let go of the host's."""
    limits, root = job["limits"], MOUNT_POINT
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, f"size={ROOT_BYTES},nr_inodes={ROOT_FILES},mode=755")
    for path in job["binds"]:
        bind(path, root + path, 0)
    for path in job["hidden"]:
        mount("tmpfs", root + path, "tmpfs", READ_ONLY | NO_SUID | NO_DEVICES | NO_EXEC, "size=4096,nr_inodes=2")
    bind("/dev/null", root + "/dev/null", NO_EXEC)
    os.mkdir(root + "/work", 0o755)
    size = f"size={limits['file_bytes']},nr_inodes={limits['files'] + 1},mode=700,uid={owner[0]},gid={owner[1]}"
    mount("tmpfs", root + "/work", "tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, size)
    os.symlink("/work", root + "/tmp")
    mount(None, root, None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES | NO_EXEC)
    os.chdir(root)
    demand("pivot_root", libc.syscall, PIVOT_ROOT[os.uname().machine], b".", b".")
    demand("pivot_root", libc.umount2, b".", DETACH)
    os.chdir("/work")


def bind(source: str, target: str, flags: int) -> None:
    """Show a file or folder of the host, to read only; flags that the host has set cannot be taken away."""
    if os.path.isdir(source):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, BIND)
    has = os.statvfs(target).f_flag
    kept = has & (NO_SUID | NO_DEVICES | NO_EXEC)
    for bit, flag in ((os.ST_NOATIME, NO_ATIME), (os.ST_NODIRATIME, NO_DIR_ATIME), (os.ST_RELATIME, RELATIVE_ATIME)):
        kept |= flag if has & bit else 0
    devices = 0 if source.startswith("/dev/") else NO_DEVICES
    mount(None, target, None, REMOUNT | BIND | READ_ONLY | NO_SUID | devices | flags | kept)


def drop_privileges(identity: tuple[int, int] | None) -> None:
    """Give up every capability for good, in every set, and become the unused user if there is one."""
    for number in range(64):
        if libc.prctl(DROP_BOUND, number, 0, 0, 0):
            break  # the kernel knows no capability of this number
    libc.prctl(AMBIENT, CLEAR_AMBIENT, 0, 0, 0)
    if identity is not None:
        become(*identity)
    header, nothing = CapabilityHeader(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    demand("capabilities", libc.capset, ctypes.byref(header), nothing)
    demand("no_new_privs", libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    demand("no_new_privs", libc.prctl, DUMPABLE, 0, 0, 0, 0)  # its end starts no program of the host's to keep a dump
    if any(capabilities()) or libc.prctl(READ_BOUND, 0, 0, 0, 0) != 0 or os.geteuid() == 0:
        raise RefusedError("capabilities", "some are left after all were dropped")


def place(files: dict[str, bytes]) -> None:
    """Write the files of the job into /work, as their owner."""
    for name, content in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)


def be_code(job: dict[str, Any], files: dict[str, bytes], report: int, channel: list[int], program: bytes) -> NoReturn:
    """Process 2: keep the descriptors that it may have, set the limits and the filter, and run the code."""
    try:
        report = keep_descriptors(report, channel)
        for name, value in limits_of(job["limits"]).items():
            hard = value + 1 if name == "CPU" else value  # a second for who does not heed the warning
            demand("limits", resource.setrlimit, getattr(resource, f"RLIMIT_{name}"), (value, hard))
        os.environ.clear()
        os.environ.update({"HOME": "/work", "TMPDIR": "/work", "PATH": "", "LANG": "C.UTF-8"})
        install(program)
    except RefusedError as error:
        tell(report, {"refused": error.args[0], "why": error.args[1]})
        os._exit(0)
    os.close(report)
    run_code(job["main"], files[job["main"]])


def keep_descriptors(report: int, channel: list[int]) -> int:
    """Leave 0 (nothing to read), 1 and 2, the channel as 3 and 4, and the report above them, which is returned."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, KEPT) for descriptor in (report, *channel)]
    nothing = os.open("/dev/null", os.O_RDONLY)
    for descriptor, place in zip((nothing, *high[1:]), (0, 3, 4), strict=False):
        os.dup2(descriptor, place)
    os.closerange(3 + len(channel), high[0])
    os.closerange(high[0] + 1, 1 << 16)
    return high[0]


def limits_of(limits: dict[str, Any]) -> dict[str, int]:
    """Return the kernel's limits of one process, by its own names."""
    return {
        "CPU": limits["cpu_seconds"],
        "AS": limits["memory_bytes"],
        "FSIZE": limits["file_bytes"],
        "NPROC": limits["processes"] + limits["threads"] + 2,  # the launcher and process 1
        "STACK": 8 << 20,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "SIGPENDING": 64,
        "NICE": 0,
        "RTPRIO": 0,
        "NOFILE": limits["open_files"],
    }


class FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(program: bytes) -> None:
    """Put the filter of system calls on this process for good."""
    filters = FilterProgram(len(program) // 8, program)
    demand("seccomp", libc.prctl, SET_SECCOMP, FILTER_MODE, ctypes.byref(filters), 0, 0)


def run_code(name: str, source: bytes) -> NoReturn:
    """Run the code as a program of its own, as `python NAME` would, and end as that would end."""
    main = type(sys)("__main__")
    main.__dict__.update({"__file__": f"/work/{name}", "__builtins__": __builtins__})
    sys.modules["__main__"], sys.argv = main, [name]
    sys.path.insert(0, "/work")
    sys.executable, code = "", 1
    try:
        exec(compile(source, name, "exec"), main.__dict__)
        code = 0
    except SystemExit as error:
        code = exit_code(error.code)
    except BaseException as error:
        show(error)
    finally:
        os._exit(finish(code))


def exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def show(error: BaseException) -> None:
    """Print the traceback from the code's own first line on."""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def finish(code: int) -> int:
    """Do what the interpreter does at its end: wait for threads, run exit functions, write out."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        return code or 1
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), os.path.dirname(os.path.abspath(__file__)))
