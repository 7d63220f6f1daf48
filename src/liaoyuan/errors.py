"""Errors are sentences: what is wrong, where, and what to do next.

The command line prints the message of a `LiaoyuanError` on one line and exits with `exit_code`; any other
exception is a defect of ours and shows its traceback.
"""

import difflib
from collections.abc import Iterable


class LiaoyuanError(Exception):
    """Something the user can mend. The message is one clear sentence (a second one may say the remedy)."""

    exit_code = 2


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""
