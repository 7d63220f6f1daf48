"""The console: a page of the project's own, on loopback alone, that shows the runs in a folder as they go on.

Runs are listed, their curves drawn over each other, their rollouts browsed; see docs/console.md.
"""

from liaoyuan.serving.console.app import build_console, open_console

__all__ = ["build_console", "open_console"]
