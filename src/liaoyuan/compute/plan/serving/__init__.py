"""What serving a trace of requests takes: the engine's own scheduler, its steps priced by the figures of a profile."""

from liaoyuan.compute.plan.serving.asks import Ask, hurried, made_up, read_asks
from liaoyuan.compute.plan.serving.engine_rates import EngineRates, read_rates
from liaoyuan.compute.plan.serving.experts import Spread, read_counts, spread, spreads
from liaoyuan.compute.plan.serving.measured import fit, measure
from liaoyuan.compute.plan.serving.model_work import Served
from liaoyuan.compute.plan.serving.plans import Machines, Planned, Way, blocks_of, plan_way, plan_ways, ways
from liaoyuan.compute.plan.serving.replica import Answer, Replica
from liaoyuan.compute.plan.serving.simulation import Outcome, Times, serve, serve_apart
from liaoyuan.compute.plan.serving.step_price import StepPrice

__all__ = [
    "Answer",
    "Ask",
    "EngineRates",
    "Machines",
    "Outcome",
    "Planned",
    "Replica",
    "Served",
    "Spread",
    "StepPrice",
    "Times",
    "Way",
    "blocks_of",
    "fit",
    "hurried",
    "made_up",
    "measure",
    "plan_way",
    "plan_ways",
    "read_asks",
    "read_counts",
    "read_rates",
    "serve",
    "serve_apart",
    "spread",
    "spreads",
    "ways",
]
