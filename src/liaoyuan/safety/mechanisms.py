"""What this host gives of what the jail is made of: found by making one and attacking it from inside."""

import functools
import json
import platform
from dataclasses import dataclass

from liaoyuan.safety import jail
from liaoyuan.safety.seccomp import MACHINES

USER = (
    "Allow user namespaces (sysctl user.max_user_namespaces=10000, on Ubuntu also"
    " kernel.apparmor_restrict_unprivileged_userns=0), or run as root"
)
CONTAINER = (
    "In a container its runtime must allow it (Docker: --cap-add SYS_ADMIN --security-opt seccomp=unconfined"
    " --security-opt apparmor=unconfined)"
)
REMEDIES = {  # in the order in which the jail asks for them
    "linux": "Run code rewards on Linux",
    "processor": f"Run code rewards on {' or '.join(MACHINES)}",
    "python": "Use a Python whose folder every user may read, with its library on disk",
    "kernel": "Use Linux 5.14 or newer",
    "user namespace": USER,
    "pid namespace": CONTAINER,
    "mount namespace": CONTAINER,
    "network namespace": CONTAINER,
    "ipc namespace": CONTAINER,
    "uts namespace": CONTAINER,
    "cgroup namespace": CONTAINER,
    "mounts": CONTAINER,
    "pivot_root": CONTAINER,
    "capabilities": CONTAINER,
    "no_new_privs": CONTAINER,
    "death with its parent": CONTAINER,
    "limits": "Raise the hard limits of this process (ulimit -H -a)",
    "seccomp": "Use a kernel with CONFIG_SECCOMP_FILTER",
    "proof": "Run as an ordinary user, or as the root of the host; if it lacks then, please report it",
}
OLDEST_KERNEL = (5, 14)  # from here on RLIMIT_NPROC counts per user namespace
PROOF = """
import json, os, resource, socket, threading

def fails(attempt):
    try:
        attempt()
    except (OSError, RuntimeError):
        return True
    return False

def start_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()

threading.stack_size(64 << 10)  # so that it is not the memory that ends first
print(json.dumps({
    "it is process 2 of its own": os.getpid() == 2,
    "it is nobody": os.getuid() != 0,
    "it sees no file of the host": not any(map(os.path.exists, ("/etc", "/home", "/proc/1", "/sys/kernel"))),
    "it writes to its folder alone": fails(lambda: open("/x", "w")),
    "it has no network": fails(socket.socket),
    "it starts no process": fails(os.fork),
    "its threads are counted": fails(lambda: [start_thread() for _ in range(64)]),
    "its limits are set": resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY,
    "its environment is its own": sorted(os.environ) == ["HOME", "LANG", "PATH", "TMPDIR"],
    "it has nothing to read": os.read(0, 1) == b"",
}))
"""


@dataclass(frozen=True)
class Mechanism:
    """A part of the jail; why: what lacks, or empty."""

    name: str
    present: bool
    why: str = ""


@functools.cache
def mechanisms() -> tuple[Mechanism, ...]:
    """Return the parts of the jail, each with whether this host gives it; found once per process."""
    lacking, why = first_lacking()
    found, names = [], list(REMEDIES)
    for name in names:
        if lacking is None or names.index(name) < names.index(lacking):
            found.append(Mechanism(name, True))
        else:
            found.append(Mechanism(name, False, why if name == lacking else "not tried"))
    return tuple(found)


def first_lacking() -> tuple[str | None, str]:
    """Return the name of the first mechanism that this host lacks, if any, and why."""
    if platform.system() != "Linux":
        return "linux", f"this is {platform.system()}"
    if platform.machine() not in MACHINES:
        return "processor", f"this is {platform.machine()}"
    version = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if version < OLDEST_KERNEL:
        return "kernel", f"this is {platform.release()}"
    try:
        result = jail.finish([jail.start(jail.Job(PROOF))])[0]
    except jail.RefusedError as error:
        return error.mechanism if error.mechanism in REMEDIES else "proof", error.why
    try:
        broken = [name for name, held in json.loads(result.output).items() if not held]
    except ValueError:
        broken = [f"the proof did not run ({jail.last_line(result.errors)})"]
    return ("proof", f"not so: {', '.join(broken)}") if broken else (None, "")


def lacking() -> str:
    """Return what this host lacks for the jail and what to do, or nothing."""
    for mechanism in mechanisms():
        if not mechanism.present:
            return f"the jail lacks its part '{mechanism.name}' here ({mechanism.why}). {REMEDIES[mechanism.name]}."
    return ""


def require() -> None:
    """Raise RefusedError, which says what lacks and what to do, unless the jail is whole here."""
    for mechanism in mechanisms():
        if not mechanism.present:
            raise jail.RefusedError(mechanism.name, mechanism.why, REMEDIES[mechanism.name])
