"""Oracle: transformers' log-softmax, through the verb itself."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import save_model
from liaoyuan.cli.score import read_token_lists
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import score
from liaoyuan.models import Decoder

LISTS = [[5, 9, 1, 44, 7], [3], [17] * 90, [2, 95]]


def test_the_verb_prints_what_transformers_computes(tiny_model: Decoder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model, tmp_path / "model")
    (tmp_path / "ids.json").write_text(json.dumps(LISTS))
    command = [sys.executable, "-m", "liaoyuan", "score", "--model", "model", "--tokens", "ids.json", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for ids, values in zip(LISTS, json.loads(done.stdout)["logprobs"], strict=True):
        if len(ids) < 2:
            assert values == []
            continue
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(values), expected, atol=1e-4)


def test_lists_are_scored_alike_alone_and_together(tiny_model: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(0, 96, (60,), generator=generator).tolist() for _ in range(200)]  # more than one pass
    together = score(tiny_model, lists)
    for index in (0, 77, 199):
        alone = score(tiny_model, [lists[index]])[0]
        assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(alone, together[index], strict=True))


@pytest.mark.parametrize("ids", [[1, 96], [1, -1], [0] * 300])
def test_impossible_tokens_are_refused(tiny_model: Decoder, ids: list[int]) -> None:
    with pytest.raises(LiaoyuanError, match="List 1"):
        score(tiny_model, [[1, 2], ids])


@pytest.mark.parametrize("text", ["{}", "[1, 2]", '[["a"]]', "[[true]]", "[[1, 2]"])
def test_a_file_that_is_no_list_of_ids_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids.json").write_text(text)
    with pytest.raises(LiaoyuanError, match=r"ids\.json"):
        read_token_lists(tmp_path / "ids.json")
    with pytest.raises(LiaoyuanError, match="does not exist"):
        read_token_lists(tmp_path / "none.json")
