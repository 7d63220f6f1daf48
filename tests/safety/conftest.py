"""Where this host has no jail, what attacks it is not run: it never counts as passed."""

import warnings

import pytest

from liaoyuan import safety

COUNTED = "not so: its threads are counted"  # of a root in a user namespace who is the host's own root


@pytest.fixture(scope="session", autouse=True)
def jail_here(request: pytest.FixtureRequest) -> None:
    """Skip, loudly, what needs the jail."""
    if safety.lacking():
        warnings.warn(f"THE ATTACKS ON THE JAIL DID NOT RUN: {safety.lacking()}", stacklevel=1)


@pytest.fixture
def jail() -> None:
    if any(part.name == "proof" and part.why not in ("", "not tried", COUNTED) for part in safety.mechanisms()):
        pytest.fail(f"this host has all that the jail needs, and it does not hold: {safety.lacking()}")
    if safety.lacking():
        pytest.skip(f"NOT RUN, so nothing is known of the jail here: {safety.lacking()}")
