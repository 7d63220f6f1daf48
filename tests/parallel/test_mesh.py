"""A process has the part of its place, also where it had another one before."""

from pathlib import Path

import torch
import torch.distributed as dist

from liaoyuan.device import Device
from liaoyuan.parallel import Layout, World, lay_out, own_block
from tests.parallel.layouts import model_of
from tests.parallel.processes import run


def places(world: World, folder: Path) -> list[int]:
    """Return where this process's part of a weight begins, before and after the two have changed places."""
    found = []
    for turn, rank in enumerate((world.rank, 1 - world.rank)):
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{turn}", rank=rank, world_size=2)
        layout = Layout(tp=2, fsdp=1)
        placed = World(rank, 2, Device("cpu")).arrange(layout)
        program = lay_out(model_of("dense", torch.float32), layout, placed)
        weight = dict(program.named_parameters())["layers.0.self_attn.o_proj.weight"]
        found.append(own_block(weight.detach())[0][1])
    return found


def test_two_processes_change_places(tmp_path: Path) -> None:
    (first, later), (other, earlier) = run(2, places, tmp_path)
    assert first == earlier == 0 < other == later
