"""`liaoyuan serve --ep N --expert-copies K`: experts move while it answers, all answers stay, and it says what it did.

Oracle: the answers of the same server before anything has moved.
"""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from liaoyuan.checkpoint import save_model
from liaoyuan.cli.serve import read_balancing
from liaoyuan.cli.serve import serve as serve_command
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.spread.balance import Balancing
from liaoyuan.models import ModelConfig, initialise
from liaoyuan.models.config import Experts
from liaoyuan.models.decoder import Decoder
from liaoyuan.models.experts import Router
from liaoyuan.serving.totals import total_health
from tests.serving.test_processes import serve

ASKED = {
    "prompt": "What is 17 + 25?",
    "max_tokens": 40,
    "ignore_eos": True,
    "temperature": 1.0,
    "seed": 3,
    "logprobs": 1,
}


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny mixture of experts whose routers choose the first half far more often."""
    experts = Experts(8, 2, 16)
    config = ModelConfig("qwen3_moe", tokenizer.vocab_size, 32, 64, 2, 4, 2, 8, 256, qk_norm=True, experts=experts)
    model = initialise(Decoder(config), 0)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        with torch.no_grad():
            router.weight[:4] = router.weight[:2].repeat(2, 1) * torch.tensor([[9.0], [9.0], [-9.0], [-9.0]])
    tokenizer_folder, made = (tmp_path_factory.mktemp(name) for name in ("tokenizer", "experts"))
    tokenizer.save(tokenizer_folder)
    save_model(model, made, tokenizer_folder)
    return made


def answer(api: str) -> Any:
    reply = httpx.post(api + "/completions", json=ASKED, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice["text"], choice["logprobs"]


def test_answers_stay_while_experts_move(folder: Path) -> None:
    options = ["--tp", "2", "--ep", "2", "--expert-copies", "2", "--rebalance-every", "0"]
    with serve(folder, *options) as (_, api):
        answers = [answer(api) for _ in range(8)]
        health = httpx.get(api.removesuffix("/v1") + "/health", trust_env=False).json()
        metrics = httpx.get(api.removesuffix("/v1") + "/metrics", trust_env=False).text
    assert answers == answers[:1] * 8
    assert health["expert_moves"] > 1 and health["expert_refusals"] == 0
    assert health["expert_copies_bytes"] == 2 * 2 * 3 * 32 * 16 * 4
    found = {
        sample.name: sample.value for family in text_string_to_metric_families(metrics) for sample in family.samples
    }
    assert found["liaoyuan_expert_moves_total"] == health["expert_moves"]
    assert found["liaoyuan_expert_imbalance_ratio"] == health["expert_imbalance"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 2, "expert_copies": 1}, "give --ep"),
        ({"rebalance_every": "5"}, "give --ep"),
        ({"tp": 2, "ep": 2, "expert_copies": 5}, "5 copies are more than the 4 experts"),
        ({"tp": 2, "ep": 2, "expert_copies": 5, "replicas": 2}, "5 copies are more than the 4 experts"),
        ({"tp": 2, "ep": 2, "rebalance_every": "soon"}, "a number of seconds, or off"),
        ({"tp": 2, "ep": 2, "expert_copies": 1, "quantise": "int8"}, "Experts of few bits"),
        ({"tp": 2, "ep": 2, "expert_copies": 1, "exact": True}, "leave out --expert-copies and --rebalance-every, or"),
        ({"tp": 2, "ep": 2, "rebalance_every": "5", "exact": True, "replicas": 2}, "an exact layout lie where"),
        ({"prefill": 1, "decode": 1, "expert_copies": 1}, "leave out --tp, --ep, --expert-copies"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LiaoyuanError, match=words):
        serve_command(folder, device="cpu", port=0, **options)


def test_copies_of_experts_that_a_model_has_not_are_refused(model_folder: Path) -> None:
    with pytest.raises(LiaoyuanError, match="has no experts"):
        serve_command(model_folder, device="cpu", port=0, tp=2, ep=2, expert_copies=1)
    with pytest.raises(LiaoyuanError, match="give --ep"):
        serve_command(model_folder, device="cpu", port=0, expert_copies=1)


@pytest.mark.parametrize(
    ("copies", "every", "wanted"),
    [(0, "", Balancing()), (2, "", Balancing(2, 60.0)), (2, "off", Balancing(2)), (0, "7.5", Balancing(0, 7.5))],
)
def test_experts_move_by_default_where_there_is_room_for_copies(copies: int, every: str, wanted: Balancing) -> None:
    assert read_balancing(copies, every) == wanted


def test_of_several_replicas_the_worst_imbalance_is_told() -> None:
    states = [{"expert_imbalance": 1.5, "expert_moves": 2}, {"expert_imbalance": 1.25, "expert_moves": 3}]
    assert total_health(states) == {"expert_imbalance": 1.5, "expert_moves": 5}
