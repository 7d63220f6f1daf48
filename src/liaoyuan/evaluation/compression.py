"""Bits per byte on held-out text, beside what general compressors need for the very same bytes.

A language model is a compressor (Shannon 1948): its cost of a text is the sum of -log2 p over its tokens. Bits per
byte do not depend on the tokenizer, so models with different vocabularies can be compared.
"""

import gzip
import lzma
import math
from collections.abc import Sequence

import numpy as np
import torch

from liaoyuan.models import Decoder, packed_context
from liaoyuan.rundir import Progress, Report, silent

BATCH_TOKENS = 8192  # rows of one scoring pass


def bits_per_byte(
    model: Decoder, documents: Sequence[tuple[np.ndarray, int]], window: int, report: Report = silent
) -> float:
    """Return the model's cost of the documents' bytes, in bits a byte.

    Args:
        documents: (ids int64 [n + 1], bytes) of each; the first id stands before the text and is not scored.
        window: the most tokens a prediction may look back over; a longer document is read in windows that overlap by
            half, so that every token but the document's first ones has at least half a window of context.
    """
    spans = [span for ids, _ in documents for span in _spans(len(ids) - 1, window, ids)]
    size = sum(count for _, count in documents)
    if not size:
        raise ValueError("there are no bytes to be scored")
    nats, done = 0.0, 0
    for group in _groups(spans):
        nats -= _score(model, group)
        done += len(group)
        report(Progress(done, len(spans), "window", "bits per byte"))
    return nats / math.log(2) / size


def gzip_bits_per_byte(text: bytes) -> float:
    """Return what `gzip -9` needs for `text` as one stream, in bits a byte."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """Return what `xz -9` needs for `text` as one stream, in bits a byte."""
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9)) / len(text)


_Span = tuple[np.ndarray, int]  # ids [m + 1] to be read, and how many of the first predictions are already counted


def _spans(count: int, window: int, ids: np.ndarray) -> list[_Span]:
    """Cut a document of `count` predictions into windows; each prediction is counted in exactly one."""
    spans, done = [], 0
    while done < count:
        begin = max(0, min(done - window // 2, count - window)) if done else 0
        end = min(begin + window, count)
        spans.append((ids[begin : end + 1], done - begin))
        done = end
    return spans


def _groups(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Put spans together into passes of about `BATCH_TOKENS` rows."""
    groups: list[list[_Span]] = [[]]
    rows = 0
    for span in spans:
        if groups[-1] and rows + len(span[0]) > BATCH_TOKENS:
            groups.append([])
            rows = 0
        groups[-1].append(span)
        rows += len(span[0])
    return groups


@torch.inference_mode()
def _score(model: Decoder, spans: Sequence[_Span]) -> float:
    """Return the sum of the log-probabilities (nats) of the predictions that these spans count."""
    place = model.embed_tokens.weight.device
    tokens = torch.from_numpy(np.concatenate([ids[:-1] for ids, _ in spans])).to(place)
    targets = torch.from_numpy(np.concatenate([ids[1:] for ids, _ in spans])).to(place)
    counted = torch.from_numpy(np.concatenate([np.arange(len(ids) - 1) >= skip for ids, skip in spans])).to(place)
    positions, context = packed_context([len(ids) - 1 for ids, _ in spans], place)
    return float(model(tokens, positions, context, targets=targets)[counted].double().sum())
