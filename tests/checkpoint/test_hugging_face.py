"""Model folders: round trips, shards, what is refused, and how much memory and reading a load takes."""

import ctypes
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from liaoyuan.checkpoint import load_model, load_weights, save_model
from liaoyuan.checkpoint.weight_files import StoredTensor
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, config_from_dict
from liaoyuan.parallel import Layout, Shape, World, lay_out, resolve
from tests.parallel.layouts import MODELS, model_of
from tests.parallel.processes import run

DTYPES = ["float32", "bfloat16", "float16"]
SHARD = 20_000  # bytes: several files for tiny models


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "experts", "latent", "sinks"])
def test_a_model_comes_back_from_its_shards_bit_for_bit(kind: str, dtype: str, tmp_path: Path) -> None:
    config = replace(config_from_dict(MODELS[kind]), dtype=dtype)
    model = Decoder(config)
    model.load_state_dict(model_of(kind, torch.float32).state_dict())
    save_model(model, tmp_path / "model", max_shard_bytes=SHARD)
    again = load_model(tmp_path / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    wide = load_model(tmp_path / "model", torch.float64).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(wide[name].to(value.dtype), value), name


@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
def test_transformers_reads_the_shards(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(kind, torch.float32)
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_bytes=SHARD)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_shards_have_the_standard_names_and_sizes(tmp_path: Path) -> None:
    save_model(model_of("latent", torch.float32), tmp_path / "m", max_shard_bytes=SHARD)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    held = {name: file for file in files for name in safe_open(tmp_path / "m" / file, framework="pt").keys()}  # noqa: SIM118
    assert index["weight_map"] == held
    tensors = tensors_in(tmp_path / "m")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        sizes = [tensors[name].nbytes for name in held if held[name] == file]
        assert sum(sizes) <= SHARD or len(sizes) == 1


def test_a_stream_of_tensors_is_written_as_it_comes(tiny_model: Decoder, tmp_path: Path) -> None:
    """No tensor is asked for while the one before it is still to be written, and the order does not matter."""
    save_model(tiny_model, tmp_path / "whole", max_shard_bytes=SHARD)
    taken = []

    def stream():
        for name, tensor in reversed(tiny_model.state_dict().items()):
            taken.append(name)
            once = tensor.clone()
            yield name, once
            once.fill_(float("nan"))  # whoever kept it would write this

    save_model(tiny_model.config, tmp_path / "streamed", state=stream(), max_shard_bytes=SHARD)
    assert taken[::-1] == list(tiny_model.state_dict())
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()


def test_a_stream_that_ends_early_or_fails_leaves_the_old_folder(tiny_model: Decoder, tmp_path: Path) -> None:
    save_model(tiny_model, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    first = next(iter(tiny_model.state_dict().items()))
    with pytest.raises(LiaoyuanError, match=r"lack 'model\.layers\.0"):
        save_model(tiny_model.config, tmp_path / "m", state=[first])

    def failing():
        yield first
        raise LiaoyuanError("gone")

    with pytest.raises(LiaoyuanError, match="gone"):
        save_model(tiny_model.config, tmp_path / "m", state=failing())
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.fixture
def sharded(tiny_model: Decoder, tmp_path: Path) -> Path:
    save_model(tiny_model, tmp_path / "m", max_shard_bytes=SHARD)
    return tmp_path / "m"


def test_a_missing_and_a_torn_shard_are_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for torn in (whole[:-1], whole + b"x", whole[: len(whole) // 2], whole[:4], b""):
        shard.write_bytes(torn)
        with pytest.raises(LiaoyuanError, match=f"{shard.name} is truncated or corrupt"):
            load_model(sharded)
    shard.unlink()
    with pytest.raises(LiaoyuanError, match=f"{shard.name} is missing"):
        load_model(sharded)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ('{"a": "../m2/model.safetensors"}', "points outside its folder"),
        ('{"a": "/etc/passwd"}', "points outside its folder"),
        ('{"a": ".."}', "not a safetensors file"),
        ('{"a": "pytorch_model.bin"}', "not a safetensors file"),
        ('{"a": 3}', "not a valid weight index"),
        ('["a"]', "not a valid weight index"),
        ('{"a": "b', "not a valid weight index"),
    ],
)
def test_an_index_that_is_wrong_is_refused(places: str, said: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": ' + places + "}")
    with pytest.raises(LiaoyuanError, match=said):
        load_model(sharded)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"x": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": [1]},
        [1],
    ],
)
def test_a_header_that_lies_is_refused(header: object, tiny_model: Decoder, tmp_path: Path) -> None:
    save_model(tiny_model, tmp_path / "m")
    text = json.dumps(header).encode()
    (tmp_path / "m" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(LiaoyuanError, match="truncated or corrupt"):
        load_model(tmp_path / "m")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tiny_model: Decoder, tmp_path: Path, monkeypatch) -> None:
    save_model(tiny_model, tmp_path / "m")
    read = StoredTensor.read

    def shrink(self: StoredTensor, *arguments) -> None:
        os.truncate(self.path, 2000)
        read(self, *arguments)

    monkeypatch.setattr(StoredTensor, "read", shrink)
    with pytest.raises(LiaoyuanError, match="ends too early"):
        load_model(tmp_path / "m")


def test_weights_in_a_dtype_that_is_not_read_are_refused(tiny_model: Decoder, tmp_path: Path) -> None:
    save_model(tiny_model, tmp_path / "m")
    tensors = tensors_in(tmp_path / "m")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(LiaoyuanError, match=r"model\.norm\.weight is stored as F8_E4M3"):
        load_model(tmp_path / "m")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_a_pickle_is_never_opened(tiny_model: Decoder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LiaoyuanError, match=r"pytorch_model\.bin is a pickle, which is never opened"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LiaoyuanError, match="truncated or corrupt"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "opened").exists()


BIG = ModelConfig("llama", 4096, 512, 1536, 6, 8, 4, 64, dtype="float32")


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of about 85 MB: what a process needs beside the weights is small beside it."""
    folder = tmp_path_factory.mktemp("big") / "m"
    model = Decoder(BIG)
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    save_model(model, folder)
    return folder


def peak(afresh: bool = False) -> int:
    """Return the peak of this process's memory, or begin anew to measure it: freed memory is given back before."""
    if afresh:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load_share(world: World, folder: Path, layout: Layout) -> tuple[int, int]:
    """Return by how much this process's memory grew at most, and the bytes that it read."""
    layout = resolve(layout, world.size, Shape(BIG, 64, 8))
    world = world.arrange(layout)
    count, read = [0], StoredTensor.read

    def counted(self: StoredTensor, buffers: list[memoryview], skip: int) -> None:
        count[0] += sum(buffer.nbytes for buffer in buffers)
        read(self, buffers, skip)

    StoredTensor.read = counted  # this process is the test's own
    for _ in range(2):  # the pages of the program itself come in with the first one
        program, count[0] = None, 0
        with torch.device("meta"):
            model = Decoder(BIG)
        before = peak(afresh=True)
        program = lay_out(model, layout, world)
        load_weights(program, folder)
        grown = peak() - before
        del model
    assert all((tensor.to_local() == 0.5).all() for _, tensor in program.named_tensors())
    return grown, count[0]


@pytest.mark.parametrize(("size", "layout"), [(2, Layout()), (4, Layout(tp=2))], ids=["fsdp 2", "fsdp 2 x tp 2"])
def test_a_process_reads_and_holds_its_own_part_alone(size: int, layout: Layout, big_folder: Path) -> None:
    whole = (big_folder / "model.safetensors").stat().st_size
    for grown, read in run(size, load_share, big_folder, layout):
        assert grown < whole * (1 / size + 0.15)
        assert read < whole * (1 / 2 + 0.01)  # of what tensor parallelism cuts by columns, whole rows


def test_a_load_holds_the_weights_once(big_folder: Path) -> None:
    whole = (big_folder / "model.safetensors").stat().st_size
    ((grown, bytes_read),) = run(1, load_alone, big_folder)
    assert whole * 0.9 < grown < whole * 1.1
    assert bytes_read <= whole


def load_alone(world: World, folder: Path) -> tuple[int, int]:
    load_model(folder)  # the pages of the program itself come in with the first one
    before = peak(afresh=True)
    model = load_model(folder)
    grown = peak() - before
    return grown, sum(tensor.nbytes for tensor in model.state_dict().values())
