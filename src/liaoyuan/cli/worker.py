"""What `liaoyuan launch` runs in each process: a verb, with a heartbeat for the launcher.

`python -m liaoyuan.cli.worker FOLDER LAUNCHER VERB ...`: the folder of the heartbeats, the launcher's process, and
the command line. A worker whose only trouble is that another one is gone says so in one line; the traceback is noise.
"""

import logging
import os
import sys
import traceback
from pathlib import Path

from liaoyuan.cli import progress
from liaoyuan.cli.main import run as run_verb
from liaoyuan.compute.heartbeat import LOST_PEER, Heartbeat, die_with, lost_peer


def worker_command(folder: Path, arguments: list[str]) -> list[str]:
    """Return the command that runs `liaoyuan` with these arguments in a worker of this process."""
    return [sys.executable, "-m", "liaoyuan.cli.worker", str(folder), str(os.getpid()), *arguments]


def main() -> None:
    """Run the verb, and end with its exit code."""
    folder, launcher, *arguments = sys.argv[1:]
    die_with(int(launcher))
    beat = Heartbeat(Path(folder), int(os.environ["RANK"]))  # torch's agent tells each worker its rank so
    progress.heartbeat.set(beat)
    if int(os.environ.get("LOCAL_RANK", "0")):  # what one host lacks is said by one of its processes
        logging.getLogger("liaoyuan.ops").setLevel(logging.ERROR)
    sys.argv = ["liaoyuan", *arguments]
    code = _run()
    beat.end(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a broken process group may never end


def _run() -> int:
    try:
        run_verb()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        if line := lost_peer(error):
            print(f"liaoyuan: another process is gone ({line})", file=sys.stderr)
            return LOST_PEER
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
