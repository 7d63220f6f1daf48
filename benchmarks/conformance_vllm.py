"""A pytest plugin for vLLM's tests over HTTP: their RemoteOpenAIServer is a server of ours, and vLLM is not installed.

What a test imports of vLLM itself is a stand-in; a test that calls one is about vLLM's own parts and is skipped.
"""

import importlib.abc
import importlib.machinery
import inspect
import itertools
import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from transformers import AutoTokenizer

from conformance_server import Kind, Servers, random_model
from liaoyuan.data.template import CHAT_TEMPLATE
from liaoyuan.serving import Settings
from liaoyuan.serving.settings import Defaults
from liaoyuan.serving.status import VERSION

FOLDER = Path(os.environ["CONFORMANCE_FOLDER"])
WITHOUT_THOUGHTS = "{%- set enable_thinking = false %}" + CHAT_TEMPLATE
TOKENS_MORE = 4  # of a text, with our tokenizer of 600 tokens
VOCABULARY, LARGE = 600, 6000  # tokens; some tests name some up to 5000
ENOUGH = 4096  # tokens of context for any prompt of the suite
OWN_PARTS = "about a part of vLLM itself, not about a server"
servers = Servers(FOLDER / "vllm")
chosen = {"vocabulary": VOCABULARY}


def pytest_unconfigure() -> None:
    servers.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests that never speak to a server, and all but one of those that differ in the model alone."""
    for item in items:
        assert isinstance(item, pytest.Function)
        speaks = any(name in item.fixturenames for name in ("server", "client", "async_client"))
        if not speaks and "RemoteOpenAIServer" not in inspect.getsource(item.function):
            item.add_marker(pytest.mark.skip(reason=OWN_PARTS))
        config = item.callspec.params.get("server_config") if hasattr(item, "callspec") else None
        if config not in (None, "hermes"):
            item.add_marker(pytest.mark.skip(reason=f"needs the model of '{config}'"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the servers of a file have a large vocabulary if its tests name tokens that only such a one has."""
    chosen["vocabulary"] = LARGE if "logprob_token_ids" in item.path.read_text() else VOCABULARY


def _model() -> Path:
    size = chosen["vocabulary"]
    return random_model(FOLDER / f"random{size}", size)


class RemoteOpenAIServer:
    """Takes the place of vLLM's class of this name."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(self, model: str, vllm_serve_args: Any = (), **options: Any) -> None:
        args = [str(arg) for arg in vllm_serve_args] if isinstance(vllm_serve_args, Sequence) else []
        self.model = model
        context = int(_option(args, "--max-model-len") or 8192)
        context *= TOKENS_MORE if context < ENOUGH else 1
        name = _option(args, "--served-model-name") or model
        template = CHAT_TEMPLATE if _option(args, "--reasoning-parser") else WITHOUT_THOUGHTS
        settings = Settings(
            sampling=Defaults(seed=0),  # so that a run says what the one before it said
            max_logprobs=int(_option(args, "--max-logprobs") or 20),
            timings="--enable-per-request-metrics" in args,
        )
        server = servers.shared(Kind(_model(), name, context, template, max_sequences=16, settings=settings))
        self.url_root = server.url
        self.host, self.port = "127.0.0.1", int(server.url.rpartition(":")[2])

    def __enter__(self) -> "RemoteOpenAIServer":
        return self

    def __exit__(self, *_: object) -> None: ...

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *(part.strip("/") for part in parts)])

    def get_client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._options("v1", options))

    def get_async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options("v1", options))

    def get_client_anthropic(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(**self._options("", options))

    def get_async_client_anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(**self._options("", options))

    def _options(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        base_url = self.url_for(path) if path else self.url_root
        return {"base_url": base_url, "api_key": self.DUMMY_API_KEY, "max_retries": 0, "timeout": 120, **options}


def _option(args: list[str], name: str) -> str | None:
    """Return the value of an option; of one that is given twice the last counts."""
    apart = (value for arg, value in itertools.pairwise(args) if arg == name)
    joined = (arg.partition("=")[2] for arg in args if arg.startswith(name + "="))
    return next(reversed([*apart, *joined]), None)


class _Absent(type):
    """The class of stand-ins for what vLLM has: they can be imported and named, but not used."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        pytest.skip(OWN_PARTS)

    def __bool__(cls) -> bool:
        return False  # no setting of vLLM is switched on

    def __iter__(cls) -> Any:
        pytest.skip(OWN_PARTS)

    def __getattr__(cls, name: str) -> Any:
        return _absent(name)


def _absent(name: str) -> Any:
    """Return the stand-in for something of vLLM: an exception, so that `pytest.raises` takes it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name, (Exception,), {})


class _NoPlatform:
    """Says no to every question about the machine."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: False


class _Hub:
    """Downloads nothing: whatever model is asked for is the random one."""

    def snapshot_download(self, *_: Any, **__: Any) -> str:
        return str(_model())


def _tokenizer(*_: Any, **__: Any) -> Any:
    """Return the random model's tokenizer as transformers reads it."""
    tokenizer = AutoTokenizer.from_pretrained(_model())
    tokenizer.chat_template = WITHOUT_THOUGHTS
    return tokenizer


class _ModelConfig:
    """Says how many tokens the random model has."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def get_vocab_size(self) -> int:
        return int(json.loads((_model() / "config.json").read_text())["vocab_size"])


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports any module of vLLM as an empty one whose names are stand-ins."""

    given = {  # noqa: RUF012
        "vllm.config": {"ModelConfig": _ModelConfig},
        "vllm.platforms": {"current_platform": _NoPlatform()},
        "vllm.tokenizers": {"get_tokenizer": _tokenizer},
        "vllm.transformers_utils.repo_utils": {"hf_api": _Hub},
        "vllm.model_executor.model_loader.weight_utils": {"download_weights_from_hf": lambda *_, **__: str(_model())},
        "vllm.version": {"__version__": VERSION},
    }

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "vllm":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__.update(self.given.get(module.__name__, {}))
        module.__getattr__ = _absent  # type: ignore[method-assign]


def _utils() -> types.ModuleType:
    """Return what takes the place of vLLM's `tests.utils`."""
    utils = types.ModuleType("tests.utils")
    utils.RemoteOpenAIServer = utils.RemoteOpenAIServerCustom = RemoteOpenAIServer  # type: ignore[attr-defined]
    utils.ROCM_EXTRA_ARGS, utils.ROCM_ENV_OVERRIDES = [], {}  # type: ignore[attr-defined]
    utils.multi_gpu_only = utils.requires_fp8 = lambda *_, **__: lambda test: test  # type: ignore[attr-defined]
    utils.VLLM_PATH = Path.cwd()  # type: ignore[attr-defined]
    return utils


sys.path.insert(0, str(Path.cwd()))
sys.meta_path.insert(0, _StandIns())
sys.modules["tests.utils"] = _utils()
sys.modules["tests.conftest"] = types.ModuleType("tests.conftest")
sys.modules["tests.conftest"].__getattr__ = _absent  # type: ignore[method-assign]
