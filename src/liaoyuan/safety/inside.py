"""The program that makes jails: it waits for orders, and each gets a process that makes a jail around itself.

It imports once what jails often need and is forked for each, so that none waits for an interpreter to start; no code of
strangers ever runs in the process that is forked. Then three processes make a jail. The launcher stays outside, keeps
the time and tells how it ended. Its child is process 1 of the jail: it makes the file system, gives up every privilege
and waits. The code is process 2, with limits and the filter on top. The first step that fails is reported, and nothing
runs.
"""

import atexit
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

from liaoyuan.safety.kernel import (
    INSIDE_ID,
    LackingError,
    demand,
    die_with_parent,
    drop_privileges,
    install,
    leave_users,
    limit,
    make_root,
    separate,
    separate_processes,
)

KEPT = 16  # the first descriptor above those that the code gets
SET_UP_SECONDS = 20.0
STOP_SECONDS = 0.2  # for code that is about to end by itself when nobody waits any more
STARTED = b'{"started": true}\n'
PRELOADED = """bisect collections copy datetime decimal fractions functools heapq itertools math operator random re
    string threading traceback unittest liaoyuan.safety.apart.judge liaoyuan.safety.apart.server""".split()  # noqa: SIM905
MOST_DESCRIPTORS = 8  # of an order: the job, output, errors, the status, a channel


def serve(descriptor: int) -> None:
    """Make a jail for each order until the other side is gone. An order is the descriptors of a job."""
    orders = socket.socket(fileno=descriptor)
    preload()
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


def preload() -> None:
    """Import what jails often need, once for all."""
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
        separate_processes()
        reports, report = os.pipe()
        init = demand("pid namespace", os.fork)
        if init == 0:
            os.close(reports)
            os.close(status)
            be_init(job, files, identity, report, channel)
        os.close(report)
        for descriptor in (1, 2, *channel):
            os.close(descriptor)
        tell(status, watch(init, reports, job["limits"]["seconds"]))
    except LackingError as error:
        tell(status, {"refused": error.args[0], "why": error.args[1]})


def tell(descriptor: int, message: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(message).encode() + b"\n")


def watch(init: int, reports: int, seconds: float) -> dict[str, Any]:
    """Wait until the jail is over: by itself, at the time limit, or because the other side is gone."""
    poll = select.poll()
    poll.register(reports, select.POLLIN)
    poll.register(0, 0)  # hang-up alone
    end, kind, buffer, started = time.monotonic() + SET_UP_SECONDS, "time", b"", False
    while (left := end - time.monotonic()) > 0:
        events = dict(poll.poll(left * 1000))
        if reports in events:
            part = os.read(reports, 1 << 16)
            buffer += part
            if not part:
                kind = "ended"
                break
            if STARTED in buffer and not started:
                end, started = time.monotonic() + seconds, True
        elif 0 in events:
            poll.unregister(0)
            end, kind = time.monotonic() + STOP_SECONDS, "stopped"
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
        die_with_parent()
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
    except LackingError as error:
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
        limit(job["limits"])
        os.environ.clear()
        os.environ.update({"HOME": "/work", "TMPDIR": "/work", "PATH": "", "LANG": "C.UTF-8"})
        install(program)
    except LackingError as error:
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
