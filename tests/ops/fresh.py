"""Python in processes that have loaded Liaoyuan and done nothing with it yet.

They are forked from one that imports and no more, so that not each of them spends seconds on that.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

TIMEOUT_S = 300
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "liaoyuan.cli.main", "liaoyuan.ops", "tests.ops.fresh"])


class Fresh:
    """A process that runs a script; it is killed where the `with` block ends before it."""

    def __init__(self, script: str, *arguments: str, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        place, given = Path(self._folder.name), dict(environment)
        self._texts = place / "stdout", place / "stderr"
        self._process = CONTEXT.Process(target=_work, args=(script, arguments, given, self._texts), daemon=False)

    def __enter__(self) -> "Fresh":
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def ended(self) -> tuple[int | None, str, str]:
        """Return its exit code (None: it hangs), and what it has printed to stdout and stderr."""
        self._process.join(TIMEOUT_S)
        out, err = (path.read_text(encoding="utf-8") for path in self._texts)
        return self._process.exitcode, out, err


def _work(script: str, arguments: tuple[str, ...], environment: Mapping[str, str], texts: tuple[Path, Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(texts, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
