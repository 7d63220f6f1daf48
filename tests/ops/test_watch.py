"""A watch sees every operator, knows whose it is, changes nothing, and is gone afterwards."""

import threading

import pytest
import torch

from liaoyuan.models import Decoder, packed_context
from liaoyuan.ops.lockstep import side_by_side
from liaoyuan.ops.watch import Call, Watch
from liaoyuan.parallel import Layout, World, lay_out
from liaoyuan.training.optimiser import AdamW

TOKENS = torch.arange(1, 21)


def loss_of(model: Decoder) -> torch.Tensor:
    positions, context = packed_context([12, 8])
    return -model(TOKENS, positions, context, TOKENS.roll(-1)).mean()


def calls_of(model: Decoder, optimiser: AdamW | None = None) -> list[Call]:
    seen: list[Call] = []

    def around(call, compute):
        seen.append(call)
        return compute()

    with Watch(model, around):
        loss_of(model).backward()
        if optimiser:
            optimiser.step(1e-3)
    return seen


def test_watching_changes_no_bit(tiny_model):
    loss_of(tiny_model).backward()
    plain = {name: weight.grad for name, weight in tiny_model.named_parameters()}
    for weight in tiny_model.parameters():
        weight.grad = None
    calls_of(tiny_model)
    assert all(torch.equal(weight.grad, plain[name]) for name, weight in tiny_model.named_parameters())


def test_every_call_is_of_the_module_that_made_it_in_both_passes(tiny_model):
    seen = calls_of(tiny_model)
    forward = [call.key for call in seen if call.phase == "forward" and not call.operator.startswith("aten.")]
    backward = [call.key for call in seen if call.phase == "backward" and not call.operator.startswith("aten.")]
    if not forward:
        pytest.skip("this machine has no kernels")
    mirrored = [("backward", module, f"{operator}_backward") for _, module, operator in reversed(forward)]
    assert backward == mirrored, "the backward pass visits the same modules in reverse"
    assert ("forward", "layers.1.post_attention_layernorm", "add_rms_norm") in forward
    assert ("forward", "layers.0.self_attn", "attention") in forward
    assert ("forward", "layers.0.self_attn", "split_rotary") in forward, "it reads two norms of that module"


def test_the_optimiser_is_a_phase_of_its_own(tiny_model):
    seen = calls_of(tiny_model, AdamW(tiny_model.named_parameters()))
    phases = [call.phase for call in seen]
    assert phases == sorted(phases, key=["forward", "backward", "update"].index)
    assert "aten._fused_adamw_" in {call.operator for call in seen if call.phase == "update"}


def test_activations_computed_again_belong_to_their_modules(tiny_model):
    tiny_model.train()
    program = lay_out(tiny_model, Layout(recompute="full"), World())
    again = [call for call in calls_of(program.models[0]) if call.phase == "backward" and call.operator == "swiglu"]
    assert {call.module.split("._checkpoint")[0].split(".mlp")[0] for call in again} <= {"layers.0", "layers.1"}


def test_nothing_is_left_when_it_ends_even_by_an_error(tiny_model):
    def around(call, compute):
        if call.module.startswith("layers.1"):
            raise RuntimeError("on purpose")
        return compute()

    with pytest.raises(RuntimeError, match="on purpose"), Watch(tiny_model, around):
        loss_of(tiny_model)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in tiny_model.modules())
    loss_of(tiny_model)  # nobody watches any more


def test_two_computations_wait_for_each_other():
    """Of two sides only one runs at a time, and neither is ahead by more than one call."""
    order: list[str] = []

    def side(letter):
        def run(around):
            def noted(call, compute):
                order.append(letter)
                return around(call, compute)

            with Watch(torch.nn.Identity(), noted):
                x = torch.ones(2)
                for _ in range(4):
                    x = x * 2.0

        return run

    before = threading.active_count()
    with side_by_side(side("A"), side("B")) as pairs:
        values = [(float(a.outputs[0][0]), float(b.outputs[0][0])) for a, b in pairs]
    assert values == [(2.0**n, 2.0**n) for n in range(1, 5)]
    assert "".join(order).replace("AB", "").strip("AB") == "" and threading.active_count() == before


def test_what_is_compared_later_is_what_was_there(tiny_model):
    """A side that has been let go past a call may change its tensor; the pair still has the old numbers."""

    def first(around):
        with Watch(torch.nn.Identity(), around):
            x = torch.zeros(3)
            y = x + 1.0
            y.exp_()
            y.mul_(3.0)

    def second(around):
        with Watch(torch.nn.Identity(), around):
            y = torch.zeros(3) * 5.0
            y.mul_(3.0)

    with side_by_side(first, second) as pairs:
        found = [
            tuple(seen and (seen.call.operator, round(float(seen.outputs[0][0]), 3)) for seen in pair) for pair in pairs
        ]
    assert found[:3] == [(("aten.add", 1.0), None), (("aten.exp_", 2.718), None), (None, ("aten.mul", 0.0))]
    assert found[3] == (("aten.mul_", 8.155), ("aten.mul_", 0.0))
