"""What `liaoyuan serve --tp` runs in each process but the first: `python -m liaoyuan.cli.follower TASK`.

It makes the calls of the first process, and ends with it: its standard input is a pipe of that process, which closes
however that one ends.
"""

import json
import os
import sys
import threading
import traceback

from liaoyuan.cli.process import importing, tune_process
from liaoyuan.errors import LiaoyuanError

PATIENCE_SECONDS = 2.0  # within which a lost connection proves to be the end of the first process


def main() -> None:
    """Follow until the leader ends it, and end at once."""
    orphaned = threading.Event()
    threading.Thread(target=_end_with_leader, args=(orphaned,), daemon=True).start()
    task = json.loads(sys.argv[1])
    tune_process(task["threads"])
    try:
        with importing():
            from liaoyuan.inference.spread.mirror import follow
            from liaoyuan.inference.spread.ranks import Task, join

        follow(*join(Task(**task)))
    except LiaoyuanError as error:
        _leave(f"liaoyuan: process {task['rank']}: {error}", error.exit_code)
    except Exception:
        if not orphaned.wait(PATIENCE_SECONDS):
            _leave(traceback.format_exc(), 1)
    _leave("", 0)


def _end_with_leader(orphaned: threading.Event) -> None:
    sys.stdin.buffer.read()
    orphaned.set()
    os._exit(0)


def _leave(words: str, code: int) -> None:
    if words:
        print(words, file=sys.stderr, flush=True)
    os._exit(code)  # threads of a broken process group may never end


if __name__ == "__main__":
    main()
