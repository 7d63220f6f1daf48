"""The engine: continuous batching over a paged cache, deterministic sampling, token ids in and out.

`Engine.generate` for evaluation and rollouts; `EngineThread` for a server.
"""

from liaoyuan.inference.adapters import Adapters, Loaded
from liaoyuan.inference.constraints.constraint import Constraint, ConstraintState
from liaoyuan.inference.constraints.grammar import Grammar, Grammars
from liaoyuan.inference.constraints.thinking import AfterThinking, ThinkMarks
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.exactness.paths import FULL, QUICK
from liaoyuan.inference.exactness.proof import Proof, prove, require_exact
from liaoyuan.inference.pooling import Pooling, embedding_steps, read_pooling
from liaoyuan.inference.request import Completion, Event, PromptLogprobs, Request, SamplingParams
from liaoyuan.inference.runner import Busy, EngineThread, Refused
from liaoyuan.inference.sizes import EngineConfig

__all__ = [
    "FULL",
    "QUICK",
    "Adapters",
    "AfterThinking",
    "Busy",
    "Completion",
    "Constraint",
    "ConstraintState",
    "Engine",
    "EngineConfig",
    "EngineThread",
    "Event",
    "Grammar",
    "Grammars",
    "Loaded",
    "Pooling",
    "PromptLogprobs",
    "Proof",
    "Refused",
    "Request",
    "SamplingParams",
    "ThinkMarks",
    "embedding_steps",
    "prove",
    "read_pooling",
    "require_exact",
]
