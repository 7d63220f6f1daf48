"""A reward model that `tune reward` has made, as the reward of rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data import Message, Record, Tokenizer, tokenise
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.rundir import read_json
from liaoyuan.tasks import Rollout, Score
from liaoyuan.tuning.preference import REWARD_FILE, reward_of


@dataclass(frozen=True)
class JudgedByModel:
    """What the model finds question, thought and answer to be worth, of any sign; nothing of an answer not whole."""

    model: Decoder
    tokenizer: Tokenizer
    mark: int
    name: str = "model"

    def __call__(self, rollout: Rollout) -> Score:
        return self.score_all([rollout])[0]

    def score_all(self, rollouts: Sequence[Rollout]) -> list[Score]:
        whole = [place for place, rollout in enumerate(rollouts) if rollout.text and not rollout.flaw]
        tokenised = tokenise(self.tokenizer, [_record(rollouts[place]) for place in whole])
        with torch.no_grad():
            values = reward_of(self.model, self.mark, [list(one.tokens) for one in tokenised]) if whole else []
        found = {place: Score(value, rollouts[place].text) for place, value in zip(whole, values, strict=True)}
        return [found.get(place, Score(None, None, one.flaw or "no answer")) for place, one in enumerate(rollouts)]


def open_judge(folder: Path, device: torch.device) -> JudgedByModel:
    """Return the reward of the model in `folder`.

    Raises:
        LiaoyuanError: the folder holds no reward model.
    """
    if not (folder / REWARD_FILE).exists():
        raise LiaoyuanError(f"{folder} has no {REWARD_FILE}, so it is no reward model: liaoyuan tune reward makes one.")
    mark = int(read_json(folder / REWARD_FILE)["mark"])
    return JudgedByModel(load_model(folder, device=device).eval(), Tokenizer.load(folder), mark)


def _record(rollout: Rollout) -> Record:
    answer = Message(role="assistant", content=rollout.text, think=rollout.thought)
    return Record(id=rollout.problem.key, messages=(Message(role="user", content=rollout.problem.question), answer))
