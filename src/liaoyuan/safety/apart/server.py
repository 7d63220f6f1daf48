"""The program in the code's jail: runs the code, then does with it what the judge asks. It decides nothing."""

import contextlib
import random
import sys
import types
from typing import Any

from liaoyuan.safety.apart.peer import GoneError, Peer

READING, WRITING = 3, 4  # the descriptors of the channel


def main() -> None:
    """Serve the judge until he is gone. Everything here may be changed by the code: it can but answer wrongly."""
    random.seed(0)  # the same code gets the same verdict
    peer = Peer(READING, WRITING, lambda target, action, name: None)
    peer.load = load
    with contextlib.suppress(GoneError):
        peer.serve()


def load(name: str) -> Any:
    """Run the file of the code as the module `name`; return it, and its public names."""
    with open("code.txt", "rb") as file:
        source = file.read()
    module = types.ModuleType(name)
    module.__file__ = f"/work/{name}.py"
    sys.modules[name] = module
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module, [word for word in vars(module) if not word.startswith("_")]
