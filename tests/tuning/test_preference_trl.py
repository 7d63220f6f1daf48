"""The losses and gradients of TRL's own trainers, on the very tokens and weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data import TokenisedRecord, Tokenizer
from liaoyuan.models.lora import adapters_of
from liaoyuan.parallel import Program, World
from liaoyuan.tuning.lora import LoraConfig
from liaoyuan.tuning.preference_batches import AnswerBatches, Judged, judge, strangers
from liaoyuan.tuning.preference_objective import PreferenceLoss, PreferenceObjective
from liaoyuan.tuning.reference import ReferredBatches
from liaoyuan.tuning.start import Start
from tests.tuning.test_preference import LENGTH, pairs

pytest.importorskip("trl", reason="TRL is not installed")


def ours(
    loss: str, folder: Path, items: list[Judged], reference: torch.Tensor, apart: torch.Tensor
) -> tuple[float, dict[str, float], torch.Tensor]:
    """Return the loss of one step over all items, what is shown, and the gradient of the token table."""
    program = Program([load_model(folder).train()])
    others = (strangers(items, LENGTH), apart)
    batches = AnswerBatches(items, reference, 0, 9 * LENGTH, 9 * LENGTH, others=others)
    own = [batches.batch([[*range(len(items))]])]
    objective = PreferenceObjective(PreferenceLoss.model_validate({"loss": loss, "beta": 0.3}))
    losses = objective.losses(program, own, World())
    found = program.backward(own, 1.0 / objective.count(own[0]), losses=losses).tolist()
    table = dict(program.named_parameters())["embed_tokens.weight"].grad
    assert table is not None
    return found[0], objective.values(found[1:]), table


def padded(answers: list[TokenisedRecord], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return answers as TRL's collators do, a row each."""
    length = max(len(answer.tokens) for answer in answers)
    fill: Any = [[0] * (length - len(answer.tokens)) for answer in answers]
    rows = zip(answers, fill, strict=True)
    tokens, masks, learned = zip(
        *(
            ([*one.tokens, *rest], [1] * len(one.tokens) + rest, [*(int(x > 0) for x in one.weights), *rest])
            for one, rest in rows
        ),
        strict=True,
    )
    values = {"input_ids": tokens, "attention_mask": masks, "completion_mask": learned}
    return {prefix + name: torch.tensor(value) for name, value in values.items()}


def trainer_of(kind: str, folder: Path, tmp_path: Path, precompute: bool = True, **settings: Any) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = {"prompt": "1+1=?", "completion": "2", "label": True} if kind == "KTO" else {}
    row = row or {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, precompute_ref_log_probs=precompute, **settings
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([row, row]),
    )


@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_pairs(loss: str, theirs: str, model_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    items = judge(tokenizer, pairs(6), True)
    reference, apart = torch.linspace(-9, -3, 12), torch.zeros(6)
    found, shown, table = ours(loss, model_folder, items, reference, apart)
    trainer = trainer_of("DPO", model_folder, tmp_path, loss_type=theirs, beta=0.3)
    batch = padded([item.answers[0] for item in items] + [item.answers[1] for item in items])
    batch |= {"ref_chosen_logps": reference[0::2], "ref_rejected_logps": reference[1::2]}
    trainer.model.train()
    expected = trainer._compute_loss(trainer.model, batch, False)
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(table, trainer.model.get_input_embeddings().weight.grad, atol=1e-4, rtol=1e-3)
    metrics = trainer._metrics["train"]
    assert shown["chosen_log_prob"] == pytest.approx(metrics["logps/chosen"][-1], rel=1e-4)
    assert shown["rejected_log_prob"] == pytest.approx(metrics["logps/rejected"][-1], rel=1e-4)
    if loss == "dpo":
        assert shown["margin"] == pytest.approx(metrics["rewards/margins"][-1], rel=1e-3)
        assert shown["accuracy"] == pytest.approx(metrics["rewards/accuracies"][-1])


def test_single_answers(model_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    items = judge(tokenizer, pairs(6), True)
    reference, apart = torch.linspace(-9, -3, 12), torch.linspace(-60, -40, 6)
    found, shown, table = ours("kto", model_folder, items, reference, apart)
    trainer = trainer_of("KTO", model_folder, tmp_path, beta=0.3)
    batch: dict[str, Any] = padded([answer for item in items for answer in item.answers])
    batch |= padded(strangers(items, LENGTH), "KL_") | {"label": torch.tensor([True, False] * 6)}
    batch |= {"ref_logps": reference, "ref_KL_logps": apart}
    trainer.model.train()
    expected = trainer._compute_loss(trainer.model, batch, False)
    expected.backward()
    assert shown["kto_divergence"] > 0
    assert shown["kto_divergence"] == pytest.approx(trainer._metrics["train"]["kl"][-1], rel=1e-4)
    assert found == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(table, trainer.model.get_input_embeddings().weight.grad, atol=1e-4, rtol=1e-3)


def test_adapters_whose_reference_is_the_base(model_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """TRL switches the adapter off for the reference too: the same loss, margin and gradients of A and B."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    start = Start(model_folder, "lora", LoraConfig(rank=3))
    model = start.load()
    with torch.no_grad():
        for adapter in adapters_of(model):
            for b in adapter.lora_B:
                b.copy_(torch.linspace(-1, 1, b.numel()).view_as(b).sin())
    program = Program([model.train()])
    start.save(program, tmp_path / "adapter")
    items = judge(tokenizer, pairs(6), True)
    batches = AnswerBatches(items, torch.zeros(12), 0, 9 * LENGTH, 9 * LENGTH)
    referred = ReferredBatches(batches, program)
    own = [referred.of(batches.batch([[*range(6)]]))]
    objective = PreferenceObjective(PreferenceLoss(beta=0.3))
    found = program.backward(own, 1.0 / 6, losses=objective.losses(program, own, World())).tolist()
    trainer = trainer_of("DPO", model_folder, tmp_path, precompute=False, beta=0.3)
    trainer.model = peft.PeftModel.from_pretrained(trainer.model, tmp_path / "adapter", is_trainable=True).train()
    batch = padded([item.answers[0] for item in items] + [item.answers[1] for item in items])
    expected = trainer._compute_loss(trainer.model, batch, False)
    expected.backward()
    assert found[0] == pytest.approx(expected.item(), rel=1e-4)
    assert objective.values(found[1:])["margin"] == pytest.approx(
        trainer._metrics["train"]["rewards/margins"][-1], rel=1e-3, abs=1e-3
    )
    theirs = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for part, a, b in (
        (p, *pair) for one in adapters_of(model) for p, *pair in zip(one.parts, one.lora_A, one.lora_B, strict=True)
    ):
        for half, weight in (("A", a), ("B", b)):
            gradient = theirs[f"base_model.model.{part.name}.lora_{half}.default.weight"]
            torch.testing.assert_close(weight.grad, gradient, atol=1e-4, rtol=1e-3)
