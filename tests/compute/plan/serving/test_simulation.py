"""A planned server takes the steps that a real one takes, and what its clock says agrees with closed forms."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.compute.plan import read_cluster
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.serving import Ask, EngineRates, Replica, Served, made_up, serve, serve_apart, simulation
from liaoyuan.compute.plan.serving.simulation import Outcome
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.drawing import Draws
from liaoyuan.inference.model_step import ModelStep
from liaoyuan.inference.plan import Plan
from liaoyuan.models import Decoder, initialise
from liaoyuan.serving import routing
from tests.compute.plan.serving.models import big, price_of, replica, small

ASKS = [Ask(0.0, 5 + 3 * n % 31, 3 + 5 * n % 13) for n in range(9)]
SAME = [Ask(0.0, 21, 2 + 3 * n, "one", 21) for n in range(4)] + [Ask(0.0, 37, 4, "one", 20), Ask(0.0, 9, 6)]
Kind = tuple[list[int], list[int], int]


@pytest.mark.parametrize(
    ("asks", "sizes"),
    [
        (ASKS, {"max_sequences": 4, "max_batch_tokens": 16, "cache_tokens": 4096}),
        (ASKS, {"max_sequences": 16, "max_batch_tokens": 512, "cache_tokens": 112}),  # so small that some give way
        (SAME, {"max_sequences": 8, "max_batch_tokens": 64, "cache_tokens": 4096}),
        (SAME, {"max_sequences": 8, "max_batch_tokens": 64, "cache_tokens": 4096, "prefix_cache": False}),
    ],
)
def test_it_takes_the_engines_steps(asks: list[Ask], sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(block_size=8, decode_steps=1, **sizes)
    planned, real = list[Kind](), list[Kind]()
    advance = ModelStep.advance

    def recorded(step: ModelStep, plan: Plan) -> Draws:
        real.append(kind_of(plan.counts, plan.lengths, len(plan.samplers)))
        return advance(step, plan)

    def price(counts: np.ndarray, lengths: np.ndarray, rows: int) -> float:
        planned.append(kind_of(counts, lengths, rows))
        return 1.0

    monkeypatch.setattr(ModelStep, "advance", recorded)
    engine = Engine(initialise(Decoder(small("dense")), seed=0).eval(), config)
    prompts = [[1 + (ask.prefix == "") * n] * ask.prompt_tokens for n, ask in enumerate(asks)]
    for n, ask in enumerate(asks):
        prompts[n][ask.prefix_tokens :] = [n + 2] * (ask.prompt_tokens - ask.prefix_tokens)
    engine.generate(
        [Request(n, tuple(prompts[n]), SamplingParams(max_tokens=ask.output_tokens)) for n, ask in enumerate(asks)]
    )
    outcome = serve(asks, [Replica(price, config, engine.pool.size, 64)])
    assert planned == real
    assert outcome.preemptions == engine.statistics()["preemptions"]
    assert outcome.seconds == len(real)


def kind_of(counts: np.ndarray, lengths: np.ndarray, rows: int) -> Kind:
    return counts.tolist(), lengths.tolist(), rows


def test_alone_a_token_takes_its_bytes_over_the_bandwidth_and_overheads() -> None:
    cluster, rates = read_cluster("h100"), EngineRates()
    profile = assumed(cluster).median()
    served, context, answer = Served(big()), 1024, 50
    price = price_of(served, cluster, profile, rates)
    outcome = serve([Ask(0.0, context, answer)], [replica(price)])
    tables = served.model.vocab_size * served.model.hidden_size
    weights = served.weight_bytes - tables * served.size  # of the embedding a token reads one row
    moved = weights + served.token_bytes * (context + answer / 2)
    calls = 12 * served.model.num_hidden_layers
    overheads = rates.step.median + rates.sequence.median + calls * profile.call.median
    expected = moved / profile.memory.median + overheads
    assert outcome.between_tokens.mean == pytest.approx(expected, rel=0.02)
    assert outcome.whole.mean == pytest.approx(outcome.first_token.mean + (answer - 1) * outcome.between_tokens.mean)


def test_the_queue_is_that_of_one_server_with_steady_work() -> None:
    """One request at a time, each of equal work: the Pollaczek-Khinchine mean wait of M/D/1, load / (2 (1 - load))."""
    work, load = 0.1, 0.5
    asks = [Ask(one.arrival, 4, 1) for one in made_up(load / work, 4, 1, 2000, 0.0, seed=1)]
    outcome = serve(asks, [Replica(lambda *_: work, EngineConfig(max_sequences=1), 64, 64)])
    waited = outcome.whole.mean - work
    assert waited == pytest.approx(work * load / (2 * (1 - load)), rel=0.12)


def test_a_prefix_is_asked_where_it_is_known_unless_others_are_much_less_busy() -> None:
    def known(prefix: int, gap: float) -> int:
        asks = [Ask(n * gap, 100, 2, str(n % 2), prefix) for n in range(40)]
        return serve(asks, [Replica(lambda *_: 0.1, EngineConfig(), 1024, 1024) for _ in range(2)]).cached_tokens

    blocks = 96 // 16 * 16
    assert known(96, 10.0) == 38 * blocks  # each prefix is computed once
    assert known(32, 10.0) <= 38 * 32  # too short to be told apart
    together = [Ask(0.0, 100, 2, "one", 96) for _ in range(40)]
    replicas = [Replica(lambda *_: 0.1, EngineConfig(max_sequences=64), 1024, 1024) for _ in range(2)]
    serve(together, replicas)
    assert all(one.computed > 0 for one in replicas)


def test_more_sequences_than_one_are_computed_together() -> None:
    asks = [Ask(0.0, 4, 10)] * 8
    together = serve(asks, [Replica(lambda *_: 1.0, EngineConfig(), 64, 64)])
    apart = serve(asks, [Replica(lambda *_: 1.0, EngineConfig(max_sequences=1), 64, 64)])
    assert (together.seconds, apart.seconds) == (10.0, 80.0)


LOADS = st.tuples(st.floats(0.5, 60), st.integers(1, 600), st.integers(1, 60), st.integers(0, 10**6))


def outcome_of(
    rate: float, prompt: int, output: int, seed: int, faster: float = 1.0, **sizes: Any
) -> tuple[Outcome, float]:
    """Return what serving comes to, and the seconds of the longest step."""
    cluster = read_cluster("h100")
    profile = assumed(cluster).median()
    profile = profile.model_copy(update={"memory": profile.memory.model_copy(update={"median": 2.7e12 * faster})})
    asks = [
        Ask(one.arrival, min(one.prompt_tokens, 2000), min(one.output_tokens, 300))
        for one in made_up(rate, prompt, output, 25, 0.5, seed)
    ]
    price, took = price_of(Served(big()), cluster, profile), [0.0]

    def timed(counts: np.ndarray, lengths: np.ndarray, rows: int) -> float:
        took.append(price(counts, lengths, rows))
        return took[-1]

    return serve(asks, [replica(timed, **sizes)]), max(took)


@settings(max_examples=8, deadline=None)
@given(LOADS, st.integers(40, 400), st.integers(4, 64))
def test_all_requests_end_and_tokens_sum(load: tuple[float, int, int, int], batch_tokens: int, sequences: int) -> None:
    rate, prompt, output, seed = load
    asks = made_up(rate, prompt, output, 25, 0.5, seed)
    seen = list[int]()

    def price(counts: np.ndarray, _: np.ndarray, rows: int) -> float:
        assert counts.sum() <= batch_tokens
        seen.append(rows)
        return 0.01

    config = EngineConfig(max_sequences=min(sequences, batch_tokens), max_batch_tokens=batch_tokens)
    most = max(ask.prompt_tokens + ask.output_tokens for ask in asks)
    server = Replica(price, config, 2 * -(-most // 16), most)
    outcome = serve(asks, [server])
    assert outcome.refused == 0
    assert sum(seen) == outcome.generated == sum(ask.output_tokens for ask in asks)
    assert sum(len(gap) for gap in server.gaps) == outcome.generated - outcome.requests
    assert server.computed + outcome.cached_tokens >= outcome.prompt_tokens + outcome.generated - outcome.requests
    assert server.pool.free == server.pool.size


# Who comes just after a step has begun waits for its end: whatever is faster or rarer meets another step, and may wait
# one step longer.


@settings(max_examples=6, deadline=None)
@given(LOADS, st.floats(1.01, 4.0))
def test_more_bandwidth_raises_the_mean_latency_by_no_more_than_a_step(
    load: tuple[float, int, int, int], faster: float
) -> None:
    (slow, _), (fast, step) = outcome_of(*load), outcome_of(*load, faster=faster)
    assert fast.whole.mean <= slow.whole.mean + step


@settings(max_examples=6, deadline=None)
@given(LOADS, st.floats(1.5, 8.0))
def test_a_lower_rate_raises_the_time_to_the_first_token_by_no_more_than_a_step(
    load: tuple[float, int, int, int], times: float
) -> None:
    rate, *rest = load
    (often, _), (rarely, step) = outcome_of(rate, *rest), outcome_of(rate / times, *rest)
    assert rarely.first_token.mean <= often.first_token.mean + step


def test_bandwidth_shortens_answers_whose_steps_it_bounds() -> None:
    slow, fast = (outcome_of(2.0, 40, 200, 1, faster=faster)[0] for faster in (0.25, 0.5))
    assert 1.8 < slow.whole.mean / fast.whole.mean < 2.2


def test_replicas_are_chosen_as_the_front_chooses_them() -> None:
    assert (simulation.SLACK, simulation.RELATIVE_SLACK) == (routing.SLACK, routing.RELATIVE_SLACK)


def test_who_could_never_fit_is_refused_and_counted() -> None:
    asks = [Ask(0.0, 100, 10), Ask(0.0, 10, 10)]
    outcome = serve(asks, [Replica(lambda *_: 1.0, EngineConfig(), 4, 200)])
    assert (outcome.refused, outcome.requests, outcome.generated) == (1, 2, 10)


def test_prompts_computed_elsewhere_hold_nobody_up() -> None:
    price = price_of(Served(big()))
    asks = [Ask(0.0, 32, 200), *(Ask(0.1 + 0.3 * n, 1800, 2) for n in range(4))]
    one = serve(asks, [replica(price), replica(price)])
    sizes = {"max_batch_tokens": 4096}
    alone = serve(asks, [replica(price, **sizes)])
    apart = serve_apart(asks, [replica(price)], [replica(price)], lambda tokens: 1e-3)
    assert apart.between_tokens.p99 < alone.between_tokens.p99 / 2
    assert apart.generated == one.generated == alone.generated
    late = serve_apart(asks, [replica(price)], [replica(price)], lambda tokens: 1.0)
    assert late.first_token.mean == pytest.approx(apart.first_token.mean + 0.999, rel=0.02)
