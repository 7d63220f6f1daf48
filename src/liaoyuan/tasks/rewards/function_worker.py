"""The program that calls a user's own reward function, in a process of its own.

It is run as a file, with the path of the user's Python file and the function's name: it runs the user's code because
the user named it. Lines of JSON: first what the function wants, then for each rollout its fields in and {"value",
"reason"} or {"failed"} out. What the function prints goes nowhere.
"""

import importlib.util
import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

REASON = 300  # characters


def main(path: str, name: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints is no answer
    function, hello = _load(path, name)
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_call(function, json.loads(line))), file=answers, flush=True)


def _load(path: str, name: str) -> tuple[Any, dict[str, Any]]:
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec = importlib.util.spec_from_file_location("users_reward", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["users_reward"] = module
        spec.loader.exec_module(module)
        function = getattr(module, name)
        wanted = list(inspect.signature(function).parameters)
    except AttributeError:
        return None, {"failed": f"it has no function '{name}'", "names": _functions(module)}
    except BaseException as error:
        return None, {"failed": _words(error)}
    return function, {"wants": wanted}


def _functions(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value)]


def _call(function: Any, fields: dict[str, Any]) -> dict[str, Any]:
    try:
        found = function(**fields)
        value, reason = found if isinstance(found, tuple) and len(found) == 2 else (found, "")
        if value is not None and not isinstance(value, bool | int | float):
            value = float(value)  # of numpy or torch, say
        return {"value": None if value is None else float(value), "reason": str(reason)[:REASON]}
    except BaseException as error:
        return {"failed": _words(error)}


def _words(error: BaseException) -> str:
    """Return an exception as one line, with the place in the user's file if it is known."""
    own = Path(sys.argv[1]).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == own]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:REASON] + place


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
