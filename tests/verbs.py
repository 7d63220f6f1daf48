"""Verbs of the command line as processes of their own that begin at once.

A new interpreter spends seconds on imports. These are forks of one process, without any thread, that has imported
everything and done nothing else: signals, exit codes, what they say and what they start are what a shell would see.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
MOST = 2**20  # bytes of a request


class Verb:
    """`liaoyuan WORDS`, to be used as a `subprocess.Popen` of text."""

    def __init__(
        self, *words: object, out: IO[str] | None = None, cwd: Path = ROOT, program: str | None = None
    ) -> None:
        """out: file for all that it says; without one `stdout` and `stderr` are pipes. program: Python's text to be run
        in place of the command, as by `python -c`.
        """
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        if out is None:
            (read_out, write_out), (read_err, write_err) = os.pipe(), os.pipe()
            self.stdout, self.stderr = os.fdopen(read_out), os.fdopen(read_err)
            theirs = [write_out, write_err]
        else:
            theirs = [os.dup(out.fileno()), os.dup(out.fileno())]
        ours, news = socket.socketpair()
        asked = {
            "words": [str(word) for word in words],
            "environment": {**os.environ, "OMP_NUM_THREADS": "1"},
            "folder": str(cwd),
            "program": program,
        }
        socket.send_fds(_server(), [json.dumps(asked).encode()], [*theirs, news.fileno()])
        for number in theirs:
            os.close(number)
        news.close()
        self._news = ours.makefile("r")
        self.pid = int(self._news.readline())

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None and select.select([self._news], [], [], 0)[0]:
            self.returncode = int(self._news.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return its exit code, which of a signal is a negative one."""
        if self.returncode is None and not select.select([self._news], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("liaoyuan", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it says, which must be little enough for a pipe."""
        self.wait(timeout)
        assert self.stdout and self.stderr
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Verb":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()
        self._news.close()


@functools.cache
def _server() -> socket.socket:
    """Start the process that verbs are forks of; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.verbs", str(theirs.fileno())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def _serve(requests: socket.socket) -> None:
    """Fork a nanny for each request, which forks the verb, waits for it and tells its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries nannies
    while True:
        message, files, _, _ = socket.recv_fds(requests, MOST, 3)
        if not message:
            return
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            if _watch(*files):
                os._exit(0)
            asked = json.loads(message)
            os.environ.clear()
            os.environ.update(asked["environment"])
            os.chdir(asked["folder"])
            sys.argv = ["liaoyuan", *asked["words"]]
            if asked["program"] is None:
                runpy.run_module("liaoyuan", run_name="__main__", alter_sys=True)
            else:
                exec(compile(asked["program"], "<program>", "exec"), {"__name__": "__main__"})
            return
        for number in files:
            os.close(number)


def _watch(out: int, err: int, news: int) -> bool:
    """Fork: in the verb return False at once; in the nanny return True when the verb has ended, which has been told."""
    pid = os.fork()
    if pid:
        os.write(news, f"{pid}\n".encode())
        for number in (0, 1, 2, out, err):
            os.close(number)
        _, status = os.waitpid(pid, 0)
        os.write(news, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        return True
    os.dup2(out, 1)
    os.dup2(err, 2)
    for number in (out, err, news):
        os.close(number)
    return False


def _import_all() -> None:
    from liaoyuan.cli.process import importing

    with importing():
        import torch._dynamo  # noqa: F401

        import liaoyuan.cli.auto_layout
        import liaoyuan.cli.live_report
        import liaoyuan.cli.main
        import liaoyuan.cli.progress
        import liaoyuan.compute.agent
        import liaoyuan.parallel
        import liaoyuan.serving
        import liaoyuan.serving.console
        import liaoyuan.training.pretrain
        import liaoyuan.tuning.preference
        import liaoyuan.tuning.rl_run
        import liaoyuan.tuning.sft_run  # noqa: F401


if __name__ == "__main__":
    _import_all()
    _serve(socket.socket(fileno=int(sys.argv[1])))
