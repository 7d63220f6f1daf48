"""What a step is said to ask of a process is what the engine computes, holds and sends."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from liaoyuan.compute.plan.program.trace import Recorder
from liaoyuan.compute.plan.serving import Served
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.drawing import Draws
from liaoyuan.inference.model_step import ModelStep
from liaoyuan.inference.plan import Plan
from liaoyuan.models import Decoder, initialise, quantise_model
from liaoyuan.models.quantised import quantisation_named
from liaoyuan.ops.choice import operators_called
from liaoyuan.parallel import Layout, Program, World, check_inference, lay_out_inference
from liaoyuan.parallel.traffic import Sent
from tests.compute.plan.serving.models import big, small
from tests.parallel.processes import run

PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (9, 8, 7))


@pytest.mark.parametrize("kind", ["dense", "tied", "experts", "latent"])
def test_products_are_those_of_the_engines_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = initialise(Decoder(small(kind)), seed=0).eval()
    plans, real = list[Plan](), list[int]()
    advance = ModelStep.advance

    def recorded(step: ModelStep, plan: Plan) -> Draws:
        with operators_called(), Recorder(Program([model])) as recorder:
            found = advance(step, plan)
        plans.append(plan)
        events = recorder.finish().events
        real.append(sum(event.flops for event in events if "attention" not in event.operator))
        return found

    monkeypatch.setattr(ModelStep, "advance", recorded)
    engine = Engine(model, EngineConfig(max_sequences=4))
    engine.generate([Request(n, prompt, SamplingParams(max_tokens=3)) for n, prompt in enumerate(PROMPTS)])
    served = Served(model.config)
    assert [len(plan.tokens) for plan in plans] == [10, 2, 2]
    for plan, flops in zip(plans, real, strict=True):
        works = served.products(len(plan.tokens), len(plan.samplers))
        assert sum(times * work.flops for times, work in works) == flops


def test_a_decoded_token_costs_the_models_flops() -> None:
    served = Served(big())
    context = 777
    flops = sum(times * work.flops for times, work in served.products(1, 1))
    flops += served.model.num_hidden_layers * served.attention(context, 1, context).flops
    assert flops == pytest.approx(served.model.flops_per_token(context), rel=2e-4)  # which counts norms' weights too


@pytest.mark.parametrize(("kind", "bits"), [("dense", None), ("experts", None), ("tied", "int8")])
def test_bytes_of_weights_and_cache_are_the_models(kind: str, bits: str | None) -> None:
    config = small(kind, hidden_size=256, intermediate_size=512, vocab_size=512)
    model = Decoder(config)
    if bits:
        quantise_model(model, quantisation_named(bits, head=None))  # type: ignore[arg-type]
    held = sum(x.nbytes for x in {id(x): x for x in [*model.parameters(), *model.buffers()]}.values())
    assert Served(config, bits=bits).weight_bytes == pytest.approx(held, rel=0.05)
    cache = KeyValueCache(config, 3, 16, torch.device("cpu"))
    assert Served(config).token_bytes * 48 == sum(layer.nbytes for layer in cache.layers())


def really_sent(world: World, config: Any, layout: Layout, tokens: int) -> dict[str, Sent]:
    layout = check_inference(layout, config)
    world = world.arrange(layout)
    with torch.device("meta"):
        model = Decoder(config)
    program = lay_out_inference(model, layout, world).initialise(0)
    model = program.models[0].eval()
    cache = KeyValueCache(config, 4, 16, torch.device("cpu"), model.key_value_heads)
    ids = torch.zeros(tokens, dtype=torch.int64)
    places = torch.arange(tokens)
    table, starts = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32)
    context = PagedContext(cache, places, table, starts, torch.tensor([tokens], dtype=torch.int32))
    with torch.inference_mode(), Recorder(program) as recorder:
        model(ids, places, context, rows=torch.tensor([tokens - 1]))
    found: dict[str, Sent] = {}
    for (_, kind), sent in recorder.finish().traffic().items():
        found[kind] = found.get(kind, Sent()) + sent
    dist.barrier()
    return found


@pytest.mark.parametrize(("kind", "processes"), [("dense", 2), ("dense", 4), ("tied", 2)])
def test_what_the_processes_of_a_replica_send(kind: str, processes: int) -> None:
    config, tokens = small(kind), 5
    found = run(processes, really_sent, config, Layout(tp=processes), tokens)[0]
    wanted: dict[str, Sent] = {}
    for times, (collective, sent) in Served(config, tp=processes).sent(tokens, 1):
        if collective != "broadcast":  # of the announcement, which is not the model's
            wanted[collective] = wanted.get(collective, Sent()) + Sent(times, round(times * sent))
    assert wanted == {kind: sent for kind, sent in found.items() if kind != "broadcast"}


def test_experts_that_are_read_are_those_that_are_chosen() -> None:
    served = Served(small("experts"))
    one, many = (max(work.batch for _, work in served.products(n, 0)) for n in (1, 500))
    assert (one, many) == (2, 8)  # of 8 experts a token chooses 2
    assert np.isclose(served.imbalance(7), 1.0)
