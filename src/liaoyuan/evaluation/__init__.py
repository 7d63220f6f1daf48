"""Measuring models: accuracy with intervals, bits per byte beside other compressors, scores of given tokens.

Every figure comes with what it must be compared with, measured on the same problems or the same bytes.
"""

from liaoyuan.evaluation.accuracy import Answers, completions_of, measure_accuracy, prompt_of, read_rollout
from liaoyuan.evaluation.agreement import Agreement, agreement
from liaoyuan.evaluation.breakdown import Line, breakdown, pass_at
from liaoyuan.evaluation.compression import bits_per_byte, gzip_bits_per_byte, xz_bits_per_byte
from liaoyuan.evaluation.intervals import Interval, bootstrap, difference_to_best, ratio
from liaoyuan.evaluation.rates import Rate, Rates, rates_of
from liaoyuan.evaluation.scores import score

__all__ = [
    "Agreement",
    "Answers",
    "Interval",
    "Line",
    "Rate",
    "Rates",
    "agreement",
    "bits_per_byte",
    "bootstrap",
    "breakdown",
    "completions_of",
    "difference_to_best",
    "gzip_bits_per_byte",
    "measure_accuracy",
    "pass_at",
    "prompt_of",
    "rates_of",
    "ratio",
    "read_rollout",
    "score",
    "xz_bits_per_byte",
]
