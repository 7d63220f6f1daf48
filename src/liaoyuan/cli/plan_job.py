"""What a run file and the options beside it ask the planner about."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liaoyuan.errors import LiaoyuanError, nearest

if TYPE_CHECKING:
    from liaoyuan.compute.plan import Cluster, Job
    from liaoyuan.compute.plan.machine.profile import DeviceProfile
    from liaoyuan.models import ModelConfig
    from liaoyuan.training.pretrain import PretrainConfig

CONTEXT = ("ulysses", "ring")


def run_config(run_file: Path | None, set_: list[str] | None) -> "PretrainConfig":
    """Return the run that a file and overrides describe; without a file the default one, of a corpus that may come."""
    from liaoyuan import config as configuration
    from liaoyuan.training.pretrain import PretrainConfig

    return configuration.load(PretrainConfig, run_file, ["corpus=.", *(set_ or [])] if not run_file else set_ or [])


def model_of(config: "PretrainConfig", device: str, vocab: int | None) -> "ModelConfig":
    """Return the run's model on a kind of device.

    Raises:
        LiaoyuanError: there is no corpus to count tokens in, and `vocab` does not say how many there are.
    """
    from liaoyuan.compute.plan.program.dry_run import Planned
    from liaoyuan.data import load_corpus
    from liaoyuan.training.pretrain import shaped

    try:
        tokens = vocab or load_corpus(config.corpus).tokenizer().vocab_size
    except LiaoyuanError as error:
        raise LiaoyuanError(f"{error} Or say here how many different tokens there are: --vocab.") from error
    return shaped(config.model, tokens, None, Planned(device))


def job_of(config: "PretrainConfig", processes: int, layout: str | None, device: str, vocab: int | None) -> "Job":
    """Return the run as the planner knows it, in the layout that the option or else the run file names."""
    from liaoyuan import config as configuration
    from liaoyuan.compute.plan import Job
    from liaoyuan.parallel import Layout

    chosen = configuration.parse(Layout, parse_layout(layout), "--layout") if layout else config.layout
    return Job(model_of(config, device, vocab), chosen, processes, config.sequence_length, config.train, device)


def names_layout(config: "PretrainConfig", layout: str | None) -> bool:
    """Return whether the option or the run file names a layout, and none is to be found."""
    return bool(layout) or ("layout" in config.model_fields_set and not config.plan.auto)


def parse_layout(text: str) -> dict[str, Any]:
    """Return the keys of `[layout]` that a text like 'tp=8,ring=2,recompute=full' sets.

    Raises:
        LiaoyuanError: a part is no KEY=VALUE, or the key is unknown.
    """
    from liaoyuan.parallel import Layout

    known, values = [*(key for key in Layout.model_fields if key != "cp"), *CONTEXT], dict[str, Any]()
    for key, value in axes_in(text, "--layout"):
        if key not in known:
            raise LiaoyuanError(f"--layout: there is no axis or setting '{key}'{nearest(key, known) or '.'}")
        if key in CONTEXT:
            values.setdefault("cp", {})[key] = value
        else:
            values[key] = value
    return values


def axes_in(text: str, option: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a text like 'tp=8,ring=2'; raises LiaoyuanError if one is no KEY=VALUE."""
    for part in text.replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise LiaoyuanError(f"{option}: '{part}' must look like tp=8.")
        yield key, value


def machines_of(cluster: str, profile: Path | None) -> "tuple[Cluster, DeviceProfile]":
    """Return what is planned for, and what is known of its cards: measured where a file says so, else assumed."""
    from liaoyuan.compute.plan import read_cluster
    from liaoyuan.compute.plan.machine.profile import assumed, read_profile

    found = read_cluster(cluster)
    return found, read_profile(profile) if profile else assumed(found)
