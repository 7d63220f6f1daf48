"""Oracle: lm-eval's own client of completion servers gives the scores of `evaluation.score`, to the last bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from liaoyuan.checkpoint import load_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.evaluation import score
from liaoyuan.serving import open_server

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260k"
PAIRS = [
    ("Once upon a time, there was a little", " girl named Lily."),
    ("Once upon a time, there was a little", " girl"),
    ("The dog was very", " happy. He ran and ran all day"),
    ("Lily", ' said, "Let\'s play!" They were friends and lived in a big house with a red door.'),
    ("The", " end."),
]

pytestmark = pytest.mark.skipif(not STORIES.exists(), reason="the shared models are not beside the project")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with open_server(STORIES, port=0, name="stories") as server:
        yield server.url


def loglikelihoods(url: str, tokenizer: str, **settings: object) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    backend = {"tokenizer_backend": "remote"} if tokenizer == "remote" else {"tokenizer": str(STORIES)}
    model = LocalCompletionsAPI(
        model="stories", base_url=f"{url}/v1/completions", max_length=512, **backend, **settings
    )
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    return model.loglikelihood(asked, disable_tqdm=True)


@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_lm_eval_gives_our_own_scores_to_the_last_bit(url: str, tokenizer: str) -> None:
    model, ours = load_model(STORIES), Tokenizer.load(STORIES)
    for (start, rest), (total, greedy) in zip(PAIRS, loglikelihoods(url, tokenizer), strict=True):
        special = tokenizer == "huggingface"  # that one puts <s> before a text
        ids, context = ours.encode(start + rest, special), len(ours.encode(start, special))
        scores = score(model, [ids])[0]
        assert total == sum(scores[context - 1 :])
        assert greedy == all(
            token == best for token, best in list(zip(ids[1:], best_tokens(model, ids), strict=True))[context - 1 :]
        )


def test_several_at_once_give_the_same(url: str) -> None:
    alone = loglikelihoods(url, "remote")
    batched = loglikelihoods(url, "remote", batch_size=4)
    assert alone == batched  # each prompt has a forward pass of its own


def best_tokens(model, ids: list[int]) -> list[int]:
    import torch

    from liaoyuan.models import packed_context

    positions, context = packed_context([len(ids) - 1])
    with torch.no_grad():
        return model(torch.tensor(ids[:-1]), positions, context).argmax(-1).tolist()
