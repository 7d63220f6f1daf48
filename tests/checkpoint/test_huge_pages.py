"""Small weights lie side by side, in memory that is large enough for huge pages."""

from itertools import pairwise

import torch

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.checkpoint.huge_pages import LINE, SMALL, TOGETHER, Together


def test_small_tensors_share_memory_from_line_to_line_and_large_ones_do_not():
    place = Together("cpu")
    odd = place.empty(torch.empty(3, 7, dtype=torch.bfloat16, device="meta"))
    next_one = place.empty(torch.empty(5, device="meta"))
    large = place.empty(torch.empty(SMALL, dtype=torch.uint8, device="meta"))
    assert (odd.shape, odd.dtype, next_one.dtype) == ((3, 7), torch.bfloat16, torch.float32)
    assert next_one.data_ptr() - odd.data_ptr() == LINE
    assert large.untyped_storage().nbytes() == SMALL
    for value, tensor in enumerate((odd, next_one, large)):
        tensor.fill_(value)
    assert not odd.any() and (next_one == 1).all()


def test_what_does_not_fit_any_more_begins_anew():
    place, third = Together("cpu"), TOGETHER // SMALL + 1
    found = [place.empty(torch.empty(SMALL - LINE, dtype=torch.uint8, device="meta")) for _ in range(third)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in found}
    assert len(storages) == 2
    places = sorted(tensor.data_ptr() for tensor in found)
    assert all(b - a >= SMALL - LINE for a, b in pairwise(places))


def test_another_devices_memory_is_its_own():
    assert Together("meta").empty(torch.empty(3, device="meta")).is_meta


def test_a_model_that_was_read_so_is_written_and_read_again(tiny_model, tmp_path):
    save_model(tiny_model, tmp_path / "one")
    once = load_model(tmp_path / "one")
    save_model(once, tmp_path / "two")
    twice = load_model(tmp_path / "two")
    for (name, a), b in zip(tiny_model.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len({p.untyped_storage().data_ptr() for p in once.parameters()}) < len(list(once.parameters()))
