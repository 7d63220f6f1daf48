"""What `liaoyuan serve --prefill --decode` runs in each worker process: `python -m liaoyuan.cli.engine_worker TASK`.

It ends with the process that started it: its standard input is a pipe of that one, which closes however that ends.
"""

import json
import os
import sys
import threading
import time
import traceback

from liaoyuan.cli.process import importing, tune_process
from liaoyuan.errors import LiaoyuanError

END_SECONDS = 5.0  # that a worker may take to end


def main() -> None:
    """Serve until standard input ends, and end at once."""
    orphaned = threading.Event()
    threading.Thread(target=_end_with_starter, args=(orphaned,), daemon=True).start()
    task = json.loads(sys.argv[1])
    tune_process(task["threads"])
    try:
        with importing():
            from liaoyuan.inference.disaggregation.process import Task, run_worker

        run_worker(Task(**task), lambda: print(json.dumps({"url": task["socket"]}), flush=True), orphaned)
    except LiaoyuanError as error:
        _leave(f"liaoyuan: {error}", error.exit_code)
    except Exception:
        _leave(traceback.format_exc(), 1)
    _leave("", 0)


def _end_with_starter(orphaned: threading.Event) -> None:
    sys.stdin.buffer.read()
    orphaned.set()
    time.sleep(END_SECONDS)
    os._exit(1)


def _leave(words: str, code: int) -> None:
    if words:
        print(words, file=sys.stderr, flush=True)
    os._exit(code)  # what is left is memory, and Python takes seconds to give that back


if __name__ == "__main__":
    main()
