"""The writer of checkpoints with a fault: `faulty_writer.py WRITER FAULT FOLDER`, run without site packages as it is.

`full`: the disk is full after the first bytes. `gate`: half way through the first state after `FOLDER/shut` appeared,
it opens the pipe `FOLDER/reached`, then waits until somebody opens the pipe `FOLDER/go`.
"""

import errno
import importlib.util
import os
import sys
from pathlib import Path

WRITER, FAULT, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
specification = importlib.util.spec_from_file_location("writer", WRITER)
assert specification and specification.loader
writer = importlib.util.module_from_spec(specification)
sys.modules["writer"] = writer
specification.loader.exec_module(writer)
whole = writer._write


def faulty(handle: int, data: memoryview) -> None:
    half = len(data) // 2
    whole(handle, data[:half])
    if FAULT == "full" and (FOLDER / "shut").exists():
        raise OSError(errno.ENOSPC, "No space left on device")
    if FAULT == "gate" and (FOLDER / "shut").exists():
        (FOLDER / "shut").unlink()
        os.close(os.open(FOLDER / "reached", os.O_WRONLY))
        os.close(os.open(FOLDER / "go", os.O_RDONLY))
    whole(handle, data[half:])


writer._write = faulty
writer.main()
