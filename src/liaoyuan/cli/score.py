"""`liaoyuan score`: the log-probability of given tokens."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from liaoyuan.cli.process import importing
from liaoyuan.errors import LiaoyuanError


def score(
    model: Annotated[Path, typer.Option(help="Model folder (config.json and safetensors).")],
    tokens: Annotated[Path, typer.Option(help="JSON file: a list of lists of token ids.")],
    json: Annotated[bool, typer.Option("--json", help='Print {"logprobs": [[...], ...]}.')] = False,
    quantise: Annotated[str | None, typer.Option(help="Quantise the weights first: int8, int4 or fp8.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or an accelerator such as cuda or npu:1.")] = "auto",
) -> None:
    """Print the log-probability of every token after the first of each list, given those before it."""
    with importing():
        from liaoyuan.checkpoint import load_model
        from liaoyuan.device import select_device
        from liaoyuan.evaluation import score as score_lists
        from liaoyuan.models import quantisation_named

    lists = read_token_lists(tokens)
    loaded = load_model(model, device=select_device(device).torch, quantisation=quantisation_named(quantise))
    logprobs = score_lists(loaded, lists)
    if json:
        print(json_module.dumps({"logprobs": logprobs}))
        return
    for index, values in enumerate(logprobs):
        mean = sum(values) / len(values) if values else 0.0
        print(f"list {index}: {len(values)} tokens, sum {sum(values):.4f}, mean {mean:.4f}")


def read_token_lists(path: Path) -> list[list[int]]:
    """Read a JSON file that holds a list of lists of token ids; raises LiaoyuanError if it does not."""
    try:
        lists = json_module.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LiaoyuanError(f"The file {path} does not exist.") from None
    except (json_module.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise LiaoyuanError(f"The file {path} is not valid JSON: {error}.") from error
    if not isinstance(lists, list) or not all(_is_ids(ids) for ids in lists):
        raise LiaoyuanError(f"The file {path} must hold a list of lists of token ids, such as [[1, 5, 9], [4, 2]].")
    return lists


def _is_ids(ids: object) -> bool:
    return isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
