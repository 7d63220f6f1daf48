"""The process that makes jails (`inside.py`), started when the first is ordered; it ends with this process.

An order is a message of descriptors through a pair of sockets, so that threads, and processes forked from this one,
may order at the same time.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from liaoyuan.safety.interpreter import ENVIRONMENT, interpreter

STOP_SECONDS = 10.0
BOOT = """
import sys, types
for name, path in (("liaoyuan", []), ("liaoyuan.safety", [sys.argv[1]])):  # this room, without what it needs outside
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from liaoyuan.safety import inside
inside.serve(int(sys.argv[2]))
"""


class Warden:
    """Holds the process and our end of the pair."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.orders: socket.socket | None = None
        os.register_at_fork(after_in_child=self.forget)

    def order(self, descriptors: Sequence[int]) -> None:
        """Hand descriptors over: of what is to be run, of its output, errors and status, and of a channel."""
        with self.lock:
            for _ in range(2):  # it may have been killed since the last order
                if self.orders is None:
                    self.begin()
                assert self.orders is not None
                try:
                    socket.send_fds(self.orders, [b"!"], descriptors)
                    return
                except (BrokenPipeError, ConnectionResetError):
                    self.end()
        raise ChildProcessError("the process that makes jails ends at once")

    def begin(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [*interpreter().command, "-c", BOOT, str(Path(__file__).parent), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.orders = ours

    def end(self) -> None:
        """Let it go; jails that still run are ended when whoever waits for them stops to."""
        if self.orders is not None:
            if self.process is not None:
                with contextlib.suppress(OSError):
                    self.orders.shutdown(socket.SHUT_RDWR)  # forked processes may have our end too
            self.orders.close()
        if self.process is not None:
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.orders = self.process = None

    def forget(self) -> None:
        """In a forked process: the warden is its parent's child, and a thread that is not here may hold the lock."""
        self.lock, self.process = threading.Lock(), None


WARDEN = Warden()
order = WARDEN.order
atexit.register(WARDEN.end)
