"""Distribution: processes, their layout, and a model laid out over them. The model knows nothing of it.

`World(0, 1)` is a single process; a `Program` is a model in its layout, which training asks for losses and gradients.
"""

from liaoyuan.parallel.closed_form import closed_form
from liaoyuan.parallel.fsdp import copies, full_weights, local, own_block
from liaoyuan.parallel.inference import check_inference, lay_out_inference
from liaoyuan.parallel.layout import Layout, Shape, resolve
from liaoyuan.parallel.owners import Owners
from liaoyuan.parallel.placed_experts import PlacedExperts
from liaoyuan.parallel.program import Losses, Program, lay_out, take_part
from liaoyuan.parallel.quantised import own_columns_of, own_rows_of, whole_part, whole_rows
from liaoyuan.parallel.traffic import Sent, Traffic, record_traffic
from liaoyuan.parallel.world import World, start

__all__ = [
    "Layout",
    "Losses",
    "Owners",
    "PlacedExperts",
    "Program",
    "Sent",
    "Shape",
    "Traffic",
    "World",
    "check_inference",
    "closed_form",
    "copies",
    "full_weights",
    "lay_out",
    "lay_out_inference",
    "local",
    "own_block",
    "own_columns_of",
    "own_rows_of",
    "record_traffic",
    "resolve",
    "start",
    "take_part",
    "whole_part",
    "whole_rows",
]
