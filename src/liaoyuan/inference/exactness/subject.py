"""The model of a proof, in this process or in several: how it is called."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from liaoyuan.inference.engine import Engine
from liaoyuan.inference.exactness.recorder import Recordings
from liaoyuan.inference.sizes import EngineConfig
from liaoyuan.inference.speculation import Drafter
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.models import Decoder, packed_context


@dataclass(frozen=True, eq=False)
class Subject:
    """model: that is proven. leader: of the processes over which it is spread, None: it is whole in this one."""

    model: Decoder
    leader: Leader | None = None
    _own: Recordings = field(default_factory=Recordings)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.embed_tokens.weight.device

    @property
    def layout(self) -> str:
        """How it lies over processes, "" in one."""
        return self.leader.layout.describe() if self.leader else ""

    @property
    def can_learn(self) -> bool:
        """Whether training computes the model in another way than scoring: by its own layout over the processes."""
        return self.leader is not None and self.leader.can_learn

    def engine(self, draft: Decoder | Drafter | None = None, **sizes: int) -> Engine:
        """Return an engine of the model."""
        room = self.model.config.max_position_embeddings
        known = {"max_batch_tokens": 2048, "cache_tokens": 4 * room + 4096} | sizes
        with torch.inference_mode():
            return Engine(self.model, EngineConfig(**known), draft, self.leader)

    def score(self, texts: Sequence[Sequence[int]], learns: bool) -> list[np.ndarray]:
        """Return the log-probability of every token after the first of each text, fp32, of a forward over all of them
        at once; with a graph for gradients if it `learns`.
        """
        device = self.device
        given = [*texts, self._padding(texts)] if learns and self.can_learn else texts
        lengths = [len(text) - 1 for text in given if len(text) > 1]
        tokens, targets = (
            torch.tensor([token for text in given for token in part(text)], device=device)
            for part in (lambda text: text[:-1], lambda text: text[1:])
        )
        positions, context = packed_context(lengths, device)
        if learns and self.can_learn:
            assert self.leader
            found = self.leader.learn(tokens, positions, targets, context.boundaries)
        else:
            with torch.set_grad_enabled(learns and self.leader is None):
                found = self.model(tokens, positions, context, targets=targets)
        values = found.detach().float().cpu().split(lengths)
        return [part.numpy() for part in values[: len(texts)]]

    def pass_alone(self, text: Sequence[int], learns: bool) -> None:
        """Compute a text as `score` does, for who records it; logits, where they are computed apart from their sum."""
        if learns and self.can_learn:
            self.score([text], learns)
            return
        tokens = torch.tensor(text[:-1], device=self.device)
        with torch.set_grad_enabled(self.leader is None):
            self.model(tokens, *packed_context([len(tokens)], tokens.device))

    def _padding(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """Return a text that makes the number of tokens one that the processes can share evenly, of other tokens than
        the first.
        """
        assert self.leader
        missing = -sum(len(text) - 1 for text in texts) % self.leader.size
        beside = (*texts[0], *[1] * missing)
        return [(token - 1) % self.model.config.vocab_size for token in beside[: missing + 1]]

    def record(self, text: Tensor, learns: bool) -> None:
        """Record what the model, or that of training, gives for the tokens of a text; see `Recordings`."""
        if self.leader is None:
            self._own.begin(self.model, text, False)
        else:
            self.leader.record(text, learns and self.can_learn)

    @property
    def recordings(self) -> Recordings:
        """The recordings of this process."""
        return self._own if self.leader is None else self.leader.recordings

    def first_differences(self) -> list[int]:
        """Return of each process what `Recordings.end` does."""
        return [self._own.end()] if self.leader is None else self.leader.first_differences()
