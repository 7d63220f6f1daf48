"""Code that nobody has read runs here and nowhere else: the jail.

The threat. A model writes a program, and training rewards it for whatever makes the tests say "passed": it will find
every way that there is. Assume native code of its own making (ctypes) in the process that runs it. It must not read or
change anything of the host, reach a network or another process, outlive its time, use up the machine, or decide how it
is judged. The tests come from data sets, so they are strangers' code as well and run in a jail too, another one.

The means are Linux's own, with nothing installed: namespaces, a root with nothing in it, no privilege, a list of
allowed system calls, limits. All of them or none: a host that lacks one is refused, with the reason (`mechanisms`).
Not held off: holes in the kernel itself, and what can be learned from how long things take.
"""

from liaoyuan.safety.jail import Job, Limits, Outcome, RefusedError, last_line, printable
from liaoyuan.safety.mechanisms import Mechanism, lacking, mechanisms, require
from liaoyuan.safety.running import run, run_all
from liaoyuan.safety.trial import Tests, Verdict, try_code

__all__ = [
    "Job",
    "Limits",
    "Mechanism",
    "Outcome",
    "RefusedError",
    "Tests",
    "Verdict",
    "lacking",
    "last_line",
    "mechanisms",
    "printable",
    "require",
    "run",
    "run_all",
    "try_code",
]
