"""A tiny corpus, a run file, and the run that nothing interrupted, made once."""

from pathlib import Path

import pytest
import tomli_w

from liaoyuan.data import CorpusConfig, prepare_corpus
from tests.parallel.processes import run_verb

STEPS = 100
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "dtype": "float32",
}
TRAIN = {"steps": STEPS, "batch_tokens": 256, "warmup_steps": 2, "checkpoint_every": 10}


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 sequences a step, so on 1, 2 or 4 processes."""
    folder = tmp_path_factory.mktemp("launch")
    text = folder / "text"
    text.mkdir()
    for index in range(40):
        lines = [f"def f{index}_{line}(x): return x + {index * line}" for line in range(30)]
        (text / f"module{index}.py").write_text("\n".join(lines))
    corpus = prepare_corpus(CorpusConfig(text=text, vocab_size=300), folder / "corpus")
    values = {"corpus": str(corpus.folder), "sequence_length": 64, "held_out_tokens": 256, "device": "cpu"}
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({**values, "model": SHAPE, "train": TRAIN}))
    return path


@pytest.fixture(scope="session")
def uninterrupted(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run on two processes that nothing interrupted (forked ones: nobody watches over them)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_verb(2, "train", run_file, "--out", folder)
    return folder
