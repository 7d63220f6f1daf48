"""What the jail asks of Linux, through the C library: namespaces, mounts, privileges, limits, the filter.

Each step names the mechanism that it needs and raises LackingError where the kernel refuses: nothing runs with less.
Only the standard library is used: this runs in the process that makes jails.
"""

import ctypes
import os
import random
import resource
import signal
from collections.abc import Callable
from typing import Any

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
INSIDE_ID = 1000  # the user in the jail, where a user namespace gives him his number
MOUNT_POINT = "/sys"  # covered in the jail's own mount namespace: nothing that is bound lies there
ROOT_BYTES, ROOT_FILES = 1 << 20, 1024  # of the file system that holds only mount points


libc = ctypes.CDLL(None, use_errno=True)


class LackingError(Exception):
    """A mechanism that this host does not give: its name, and why."""


def demand(mechanism: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `call` returns; raises LackingError in the name of the mechanism if it fails."""
    try:
        result = call(*arguments)
    except OSError as error:
        raise LackingError(mechanism, f"{error.strerror} ({error.filename or getattr(call, '__name__', '')})") from None
    if isinstance(result, int) and result == -1:  # so functions of libc say it
        raise LackingError(mechanism, f"{os.strerror(ctypes.get_errno())} ({getattr(call, '__name__', '')})")
    return result


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
        raise LackingError("user namespace", "root without the right to become another user: no limit would bind it")
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
        raise LackingError("mounts", f"mount of {kind or source or 'the root'} at {target}: {os.strerror(number)}")


def make_root(job: dict[str, Any], owner: tuple[int, int]) -> None:
    """Make a root of nothing but Python's library, the folder /work and /dev/null, and let go of the host's."""
    limits, root = job["limits"], MOUNT_POINT
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, f"size={ROOT_BYTES},nr_inodes={ROOT_FILES},mode=755")
    for path in job["binds"]:
        if not os.access(path, os.R_OK):
            raise LackingError("python", f"{path} cannot be read by user {os.geteuid()}")
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
        raise LackingError("capabilities", "some are left after all were dropped")


def separate_processes() -> None:
    """Let the next child be process 1 of a space of its own; when it ends, all of them end."""
    demand("pid namespace", libc.unshare, NEW_PID)


def die_with_parent() -> None:
    demand("death with its parent", libc.prctl, DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def limit(limits: dict[str, Any]) -> None:
    """Set the limits of this process, or those that it has if they are lower."""
    for name, value in limits_of(limits).items():
        number = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(number)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        hard = value + 1 if name == "CPU" and value != highest else value  # a second for who does not heed the warning
        demand("limits", resource.setrlimit, number, (value, hard))


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
