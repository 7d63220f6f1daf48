"""How `liaoyuan serve --replicas` runs itself again, once for each replica."""

import os
import sys
import threading
import time

import click

from liaoyuan.cli.process import ProcessSettings, available_cores
from liaoyuan.serving import Server

END_SECONDS = 8.0  # that a server may take to end; less than its front waits


def replica_command() -> list[str]:
    """Return this process's own command with what differs in a replica: of an option given twice the last counts."""
    own = ["--replicas", "1", "--replica", "--host", "127.0.0.1", "--port", "0", "--json"]
    return [sys.executable, "-m", "liaoyuan", *sys.argv[1:], *own]


def threads_of_each(replicas: int) -> int:
    """Return the threads of each replica: as many as the user asked for, else its part of the cores."""
    context = click.get_current_context(silent=True)
    settings = context.obj if context else None
    if isinstance(settings, ProcessSettings) and settings.threads_from == "OMP_NUM_THREADS":
        return settings.threads
    return max(1, available_cores() // replicas)


def run_replica(server: Server) -> None:
    """Serve until standard input ends: whoever started this process is gone, or says that it is over."""
    threading.Thread(target=_end_with_input, args=(server,), name="input", daemon=True).start()
    server.run()
    sys.stdout.flush()
    os._exit(0)  # what is left is memory, and Python takes seconds to give that back


def _end_with_input(server: Server) -> None:
    sys.stdin.buffer.read()
    server.stop()
    time.sleep(END_SECONDS)
    os._exit(1)
