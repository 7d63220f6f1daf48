"""A pytest plugin for llama.cpp's server suite: its ServerProcess starts a server of ours instead of its own."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import requests

from conformance_server import CHATML, Kind, Servers, random_model
from liaoyuan.serving import Settings
from liaoyuan.serving.settings import Defaults

STORIES = Path(os.environ["CONFORMANCE_STORIES"])
FOLDER = Path(os.environ["CONFORMANCE_FOLDER"])
FILLING = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
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
    before = vars(self).get("ours")  # a test that starts its server again finds it at the same port
    self.ours = servers.fresh(_kind(self), before)
    self.server_port = int(self.ours.url.rpartition(":")[2])


def _no_download(*_: Any, **__: Any) -> None:
    pytest.skip("needs the model that it downloads")


def _kind(self: Any) -> Kind:
    """Return the kind of server that a test asks for; one that names another model gets a random one."""
    named = f"{self.model_hf_repo}{self.model_hf_file}"
    stories = "stories260K" in named and "infill" not in named
    model = STORIES if stories else random_model(FOLDER / "random")
    if "infill" in named:
        model = random_model(FOLDER / "filling", further=FILLING)
    slots = 1 if self.kv_unified else max(1, self.n_slots or 1)
    template = CHATML if stories else None
    if self.chat_template_file:
        template = Path(self.chat_template_file).read_text()
    context = max(64, (self.n_ctx or 2048) // slots)
    name, *aliases = sorted((self.model_alias or "model").split(","))  # llama.cpp sorts them
    origins, thinking = (self.cors_origins or "*",), self.reasoning != "off"
    settings = Settings(
        sampling=Defaults(seed=self.seed, temperature=self.temperature),
        aliases=tuple(aliases),
        tags=tuple(self.model_tags.split(",")) if self.model_tags else (),
        page=not self.no_ui,
        metrics=bool(self.server_metrics),
        slots=bool(self.server_slots),
        verbose=bool(self.debug),
        continue_final_message=True,
        pooling=self.pooling,
        sleep_after=self.sleep_idle_seconds,
    )
    return Kind(
        model,
        name,
        context,
        template,
        True,
        max(1, self.n_slots or 4),
        self.api_key,
        origins,
        thinking,
        self.n_batch,
        self.server_host,
        settings,
    )


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
