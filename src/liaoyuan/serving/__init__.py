"""Serving: an OpenAI-compatible HTTP API and a chat page around the engine, on loopback unless told otherwise.

`open_server` serves a model folder; `build_app` makes the application around any runner of requests.
"""

from liaoyuan.serving.about import About, Words, read_about
from liaoyuan.serving.apart import Sides
from liaoyuan.serving.app import build_app
from liaoyuan.serving.keys import Keys, read_keys
from liaoyuan.serving.security import Access
from liaoyuan.serving.server import Server, check_port, is_loopback, open_front, open_server
from liaoyuan.serving.settings import Settings

__all__ = [
    "About",
    "Access",
    "Keys",
    "Server",
    "Settings",
    "Sides",
    "Words",
    "build_app",
    "check_port",
    "is_loopback",
    "open_front",
    "open_server",
    "read_about",
    "read_keys",
]
