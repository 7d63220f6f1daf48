"""Which files of the host Python needs to run: its library, and the shared libraries of its extension modules.

The jail shows these and no others. They are asked of the interpreter itself, once per process.
"""

import functools
import json
import subprocess
import sys
from dataclasses import dataclass

from liaoyuan.errors import LiaoyuanError

FLAGS = ("-S", "-s", "-P", "-B", "-X", "utf8")  # no site, no user's site, no folder of the script, no bytecode, UTF-8
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # alone: the same code ends in the same way every time
PROBE = """
import ctypes, importlib, json, os, sys

folders = [os.path.realpath(path) for path in sys.path if os.path.isdir(path)]
modules = {name.partition(".")[0] for path in folders for name in os.listdir(path) if name.endswith(".so")}
for name in modules:
    if not name.startswith(("_test", "_xx", "xx", "_tk", "_curses", "_dbm", "_gdbm", "nis", "readline", "ossaudio")):
        try:
            importlib.import_module(name)
        except ImportError:
            pass

class Library(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))

found = []
kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Library), ctypes.c_size_t, ctypes.c_void_p)
visit = kind(lambda library, size, data: found.append(os.fsdecode(library.contents.name)) or 0)
ctypes.CDLL(None).dl_iterate_phdr(visit, None)
print(json.dumps({"folders": folders, "archives": [p for p in sys.path if os.path.isfile(p)], "libraries": found}))
"""
PROBE_SECONDS = 60.0


@dataclass(frozen=True)
class Interpreter:
    """The command that starts Python, the paths that it needs, and the folders in these that code must not see."""

    command: tuple[str, ...]
    binds: tuple[str, ...]
    hidden: tuple[str, ...]


@functools.cache
def interpreter() -> Interpreter:
    """Return what this process's own Python needs; raises LiaoyuanError if it cannot be asked."""
    command = (sys.executable, *FLAGS)
    try:
        answer = subprocess.run(
            [*command, "-c", PROBE], env=ENVIRONMENT, capture_output=True, timeout=PROBE_SECONDS, check=True
        )
        found = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise LiaoyuanError(
            f"Python ({sys.executable or 'no path'}) does not say which files it needs: {error}."
        ) from None
    folders = [path for path in found["folders"] if not any(within(path, other) for other in found["folders"])]
    shown = [*folders, *found["archives"]]
    libraries = [
        path for path in found["libraries"] if path.startswith("/") and not any(within(path, f) for f in folders)
    ]
    hidden = [f"{folder}/{name}" for folder in folders for name in ("site-packages", "dist-packages")]
    return Interpreter(command, tuple(dict.fromkeys([*shown, *libraries])), tuple(hidden))


def within(path: str, folder: str) -> bool:
    return path.startswith(folder + "/")
