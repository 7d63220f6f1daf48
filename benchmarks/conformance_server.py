"""Our server as foreign suites ask for it: model folders with their template and context, one server per kind."""

import json
import random
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from liaoyuan.checkpoint import save_model
from liaoyuan.data.tokenizer import Tokenizer, train_tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.serving import Server, Settings, open_server
from liaoyuan.serving.generation import Served
from liaoyuan.serving.keys import Keys
from liaoyuan.serving.security import Access

CHATML = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\nCall tools as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' }}
    {{- '<tools>' + tools | tojson + '</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
MOST_RUNNING = 4
SENTENCES = [
    "Hello, my name is Ada, and the capital of France is Paris. What is the weather in Dallas, Texas today?",
    'The president said: write one hundred words, {"name": "value", "numbers": [1, 2.5, -3e7], "yes": true}.',
    "Zwölf Boxkämpfer jagen Viktor. 今天天气很好，我们去公园散步。 Les élèves étudient à l'école. 🔥🙂",
]


@dataclass(frozen=True)
class Kind:
    """What a suite asks of a server."""

    model: Path
    name: str
    context: int
    template: str | None = CHATML
    any_model: bool = False  # answer whatever model a request names
    max_sequences: int = 8
    key: str | None = None
    origins: tuple[str, ...] = ()
    thinking: bool = True
    batch_tokens: int | None = None
    host: str = "127.0.0.1"
    settings: Settings = field(default_factory=Settings)


class Servers:
    """Servers of ours, of which the last few run; model folders lie under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self._running: deque[Server] = deque()
        self._kinds: dict[Kind, Server] = {}

    def shared(self, kind: Kind) -> Server:
        """Return the server of this kind, started at the first time."""
        if kind not in self._kinds:
            self._kinds[kind] = self._start(kind)
        return self._kinds[kind]

    def fresh(self, kind: Kind, before: Server | None = None) -> Server:
        """Return a server that has seen no request; the one before the last few is ended."""
        port = 0
        if before is not None and before in self._running:  # it takes the place of this one
            port = int(before.url.rpartition(":")[2])
            self._running.remove(before)
            before.__exit__(None, None, None)
        self._running.append(self._start(kind, port))
        if len(self._running) > MOST_RUNNING:
            self._running.popleft().stop()
        return self._running[-1]

    def _start(self, kind: Kind, port: int = 0) -> Server:
        self._started += 1
        folder = _folder(kind, self._folder / f"model{self._started}")
        if kind.any_model:
            Served.check_model = Served.choose_model = lambda self, name: None  # type: ignore[method-assign]
        most = EngineConfig().max_batch_tokens if kind.batch_tokens is None else kind.batch_tokens
        config = EngineConfig(max_sequences=kind.max_sequences, max_batch_tokens=max(most, kind.max_sequences))
        access = Access(keys=Keys({"suite": kind.key} if kind.key else {}), origins=kind.origins)
        server = open_server(
            folder,
            kind.host,
            port,
            "cpu",
            kind.name,
            engine=config,
            access=access,
            thinking=kind.thinking,
            settings=kind.settings,
        )
        return server.__enter__()

    def close(self) -> None:
        """End all servers that run."""
        for server in (*self._running, *self._kinds.values()):
            server.stop()


def _folder(kind: Kind, target: Path) -> Path:
    """Return a model folder with another context and template; weights and tokenizer are links."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for path in kind.model.iterdir():
        if path.name not in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((kind.model / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": kind.context}))
    settings = json.loads((kind.model / "tokenizer_config.json").read_text())
    template = {} if kind.template is None else {"chat_template": kind.template}
    (target / "tokenizer_config.json").write_text(json.dumps({**settings, **template}))
    return target


def random_model(target: Path, vocabulary: int = 600, further: Sequence[str] = ()) -> Path:
    """Return a folder with a small random model of the Qwen3 family, and a tokenizer of our own.

    vocabulary: its tokens, of which a larger one has made-up words. further: special tokens beyond them.
    """
    if not (target / "config.json").exists():
        chance = random.Random(0)
        words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(vocabulary)]
        texts = [*SENTENCES * 20, *(words if vocabulary > 600 else ())]
        tokenizer = train_tokenizer(texts, vocabulary)
        tokenizer.save(target)
        if further:
            _add_tokens(target / "tokenizer.json", tokenizer.vocab_size, further)
            tokenizer = Tokenizer.load(target)
        config = ModelConfig("qwen3", tokenizer.vocab_size, 64, 128, 2, 4, 2, 16, 8192, qk_norm=True)
        save_model(initialise(Decoder(config), 0), target, target)
    return target


def _add_tokens(path: Path, first: int, tokens: Sequence[str]) -> None:
    """Give a tokenizer special tokens with the ids that come next."""
    definition = json.loads(path.read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition["added_tokens"] += [{"id": first + n, "content": token, **plain} for n, token in enumerate(tokens)]
    path.write_text(json.dumps(definition))
