"""Who asks: what the door knows of a request before its body is read, for whatever the request sets going."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from liaoyuan.serving.errors import ApiError


@dataclass(frozen=True)
class Caller:
    """One HTTP request.

    id: of the request, the client's own if it sent one. key: the name of its API key, or "". endpoint: the path it
    asks. timeout: seconds from its arrival within which it is to be answered; None: for ever.
    """

    id: str = ""
    key: str = ""
    endpoint: str = ""
    timeout: float | None = None
    arrived: float = field(default_factory=time.monotonic)

    def time_left(self) -> float | None:
        """Return the seconds that are left; None: no end of them.

        Raises:
            ApiError: none are left (504).
        """
        if self.timeout is None:
            return None
        left = self.arrived + self.timeout - time.monotonic()
        if left <= 0:
            raise self.too_late()
        return left

    def too_late(self) -> ApiError:
        """Return the error of a request whose time is up."""
        return ApiError(504, f"There was no answer within {self.timeout or 0:g} seconds.", code="timeout")


NOBODY = Caller(arrived=0.0)
# Of one HTTP request, not of the process: tasks and threads that work for it inherit it.
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
