"""What a run begins with and what it leaves: a model whose every weight is trained, or one that lies frozen below
adapters, which alone are trained and written. Every verb of `tune` begins here.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from liaoyuan.checkpoint import load_model, load_weights, save_program
from liaoyuan.checkpoint.adapters import put_adapter
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, Quantisation, read_config
from liaoyuan.models.quantised import quantisation_named
from liaoyuan.parallel import Layout, Program, Shape, World, lay_out, resolve
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.card import Relation
from liaoyuan.tuning.lora import LoraConfig, Method, add_adapters, begin, refuse_layout, save_adapters

MODEL, ADAPTER = "model", "adapter"  # the folder of the result in a run folder


@dataclass(frozen=True)
class Start:
    """The model folder that a run begins with, and how it is trained.

    lora: of adapters, if `method` is not "full"; seed: of their first values.
    """

    model: Path
    method: Method = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int = 0

    @property
    def has_adapters(self) -> bool:
        return self.method != "full"

    @property
    def name(self) -> str:
        """Of the result's folder in the run folder."""
        return ADAPTER if self.has_adapters else MODEL

    @property
    def relation(self) -> Relation:
        """Of the result to the model folder, for its card."""
        return "adapter" if self.has_adapters else "finetune"

    @property
    def bits(self) -> Quantisation | None:
        """In how many bits the model lies below adapters; None: whole."""
        is_whole = not self.has_adapters or self.lora.base == "whole"
        return quantisation_named(None if is_whole else self.lora.base, head=None)

    def base(self, device: torch.device | str = "cpu") -> Decoder:
        """Return the model as it is before it is trained."""
        return load_model(self.model, device=device, quantisation=self.bits)

    def load(self, device: torch.device | str = "cpu") -> Decoder:
        """Return the model to train, in this process alone.

        Raises:
            LiaoyuanError: the folder is wrong, or lacks the projections that are to be adapted.
        """
        model = self.base(device)
        if self.has_adapters:
            begin(Program([add_adapters(model, self.method, self.lora)]), self.seed)
        return model

    def lay_out(self, layout: Layout, train: TrainConfig, sequence_length: int, world: World) -> tuple[Program, World]:
        """Return the model to train over the processes of `world`, and these in that layout.

        Raises:
            LiaoyuanError: the layout does not fit, or is none for adapters.
        """
        shape, rows = read_config(self.model), train.batch_tokens // sequence_length
        layout = resolve(layout, world.size, Shape(shape, sequence_length, rows, train.microbatches))
        if self.has_adapters:
            refuse_layout(layout, self.lora, world.size)
        world = world.arrange(layout)
        if self.bits is not None:
            model = self.base(world.device.torch)
            program = lay_out(add_adapters(model, self.method, self.lora), layout, world)
        else:
            with torch.device("meta"):
                model = Decoder(shape)
            if self.has_adapters:
                add_adapters(model, self.method, self.lora)
            program = lay_out(model, layout, world)
            load_weights(program, self.model)
        if self.has_adapters:
            begin(program, self.seed)
        return program, world

    def save(self, program: Program, folder: Path, world: World | None = None) -> None:
        """Write the model with its tokenizer, or its adapters alone. Every process makes the call."""
        if self.has_adapters:
            save_adapters(program, folder, self.model, self.method, self.lora, world or World())
        else:
            save_program(program, folder, self.model, world or World())

    def trained(self, folder: Path) -> Decoder:
        """Return the model that a run has left in `folder`, an adapter on what it was trained on.

        Raises:
            LiaoyuanError: something is torn or of another model.
        """
        if not self.has_adapters:
            return load_model(folder)
        model = self.base()
        put_adapter(folder, model)
        return model


def refuse_whole(optimiser: str, section: str = "train", master_dtype: str = "float32") -> None:
    """Raise LiaoyuanError for what makes sense of whole weights alone."""
    if optimiser == "muon":
        raise LiaoyuanError(f"{section}.optimiser = 'muon' is for whole matrices: adapters are trained with 'adamw'.")
    if master_dtype == "bfloat16":
        raise LiaoyuanError("train.master_dtype = 'bfloat16' is for whole weights: adapters are few, and kept in fp32.")
