"""A pytest plugin for llama.cpp's server suite: its ServerProcess starts a server of ours instead of its own."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import requests

from conformance_server import CHATML, Kind, Servers, random_model

STORIES = Path(os.environ["CONFORMANCE_STORIES"])
FOLDER = Path(os.environ["CONFORMANCE_FOLDER"])
servers = Servers(FOLDER / "llama")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests that download a model of some billion parameters, which the suite calls slow."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="needs the model that it downloads"))


def pytest_unconfigure() -> None:
    servers.close()


def _start(self: Any, timeout_seconds: int = 60) -> None:
    router = self.models_dir or self.models_preset or self.model_hf_repo is None
    if router and not self.cors_origins:  # what pages may ask of a router, a server of one model can say too
        pytest.fail("starts a router")
    self.server_port = int(servers.fresh(_kind(self)).url.rpartition(":")[2])
    self.server_host = "127.0.0.1"


def _no_download(*_: Any, **__: Any) -> None:
    pytest.skip("needs the model that it downloads")


def _kind(self: Any) -> Kind:
    """Return the kind of server that a test asks for; one that names another model gets a random one."""
    stories = "stories260K" in f"{self.model_hf_repo}{self.model_hf_file}" and "infill" not in str(self.model_hf_repo)
    model = STORIES if stories else random_model(FOLDER / "random")
    slots = 1 if self.kv_unified else max(1, self.n_slots or 1)
    template = CHATML if stories else None
    if self.chat_template_file:
        template = Path(self.chat_template_file).read_text()
    context = max(64, (self.n_ctx or 2048) // slots)
    name = self.model_alias or "model"
    origins, thinking = (self.cors_origins or "*",), self.reasoning != "off"
    return Kind(model, name, context, template, True, key=self.api_key, origins=origins, thinking=thinking)


sys.modules["wget"] = types.ModuleType("wget")  # the suite downloads models with it
sys.modules["wget"].download = _no_download  # type: ignore[attr-defined]
sys.path.insert(0, str(Path.cwd()))
import utils  # noqa: E402  (the suite's own, in the folder where pytest runs)

asked = utils.ServerProcess.make_request


def _make_request(self: Any, *given: Any, **named: Any) -> Any:
    """Ask as the suite does; headers are found in any case, as HTTP has it (the suite keeps a dict)."""
    reply = asked(self, *given, **named)
    reply.headers = requests.structures.CaseInsensitiveDict(reply.headers)
    return reply


utils.ServerProcess.make_request = _make_request
utils.ServerProcess.start = _start
utils.ServerProcess.stop = lambda self: None
utils.ServerPreset.load_all = staticmethod(lambda: None)
