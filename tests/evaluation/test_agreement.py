"""How far two models' next tokens are apart: nothing for the same one, and what the definition says for others."""

import dataclasses

import pytest
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import agreement, score
from liaoyuan.models import Decoder, ModelConfig, Quantisation, packed_context, quantise_model
from tests.conftest import randomised

TEXTS = [list(range(30)), [5], [7, 7, 7, 8]]


def test_a_model_agrees_with_itself(tiny_model: Decoder) -> None:
    found = agreement(tiny_model, tiny_model, TEXTS)
    assert (found.divergence, found.worst, found.same_first, found.places) == (0.0, 0.0, 1.0, 32)
    expected = -sum(sum(values) for values in score(tiny_model, TEXTS)) / 32
    assert found.loss == found.reference_loss == pytest.approx(expected, rel=1e-5)


def test_the_divergence_is_that_of_the_definition(tiny_config: ModelConfig) -> None:
    one, two = randomised(tiny_config, 0), randomised(tiny_config, 1)
    found = agreement(one, two, TEXTS[:1])
    positions, context = packed_context([29])
    with torch.no_grad():
        p, q = (m(torch.arange(29), positions, context).double().log_softmax(-1) for m in (one, two))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.divergence == pytest.approx(float(expected), rel=1e-4)
    assert found.same_first == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.loss != found.reference_loss


def test_fewer_bits_agree_less(tiny_config: ModelConfig) -> None:
    whole = randomised(tiny_config, 0)
    eight, four = (
        agreement(whole, quantise_model(randomised(tiny_config, 0), Quantisation(kind)), TEXTS).divergence
        for kind in ("int8", "int4")
    )
    assert 0 < eight < four / 4


def test_what_cannot_be_compared_is_refused(tiny_config: ModelConfig) -> None:
    one, two = randomised(tiny_config, 0), randomised(dataclasses.replace(tiny_config, vocab_size=97), 0)
    with pytest.raises(LiaoyuanError, match="96 and 97 tokens"):
        agreement(one, two, TEXTS)
    with pytest.raises(LiaoyuanError, match="nothing to compare"):
        agreement(one, one, [[3]])
