"""Probabilities as integers, so that two machines agree to the last bit, as a range coder needs.

A distribution over K codes is K weights, integers of at least 0 that sum to `2**PRECISION - K`; the probability of a code
is (weight + 1) / 2**PRECISION, so that no code is impossible. The range coder takes floats: float64 holds the weights
exactly, and with that sum its scale is 1 and its cumulative counts are exact. The remainder of rounding goes to the most
likely code.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from torch import Tensor

from isic_vq.data.provenance import PROVENANCE
from isic_vq.hub.pretrained import resolve
from isic_vq.models.checks import check_finite, damaged_or_overflow

PRECISION = 24
Weights = NDArray[np.float64]


def integer_weights(logits: Tensor) -> Weights:
    """Weights `(B, K)` of softmax(logits), from logits `(B, K)` on the CPU; ValueError if one is not finite."""
    check_finite(logits, "logits", damaged_or_overflow(logits.dtype))
    values = logits.numpy().astype(np.float64)
    probabilities = np.exp(values - values.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    total = 2**PRECISION - values.shape[1]
    weights = np.floor(probabilities * total)
    weights[np.arange(len(weights)), weights.argmax(axis=1)] += total - weights.sum(axis=1)
    return weights


def static_weights(counts: Sequence[int]) -> Weights:
    """Weights `(K,)` in proportion to counts + 1, by integer arithmetic: the same on every machine."""
    total, sum_of_counts = 2**PRECISION - len(counts), sum(counts) + len(counts)
    weights = [(count + 1) * total // sum_of_counts for count in counts]
    weights[weights.index(max(weights))] += total - sum(weights)
    return np.array(weights, dtype=np.float64)


def table_hash(weights: Weights) -> str:
    """The sha256 of a table: sixteen hex digits."""
    return hashlib.sha256(weights.astype("<u4").tobytes()).hexdigest()[:16]


def training_code_counts(model: str | None = None) -> list[int] | None:
    """Read the counts of the K codes in the training images from a checkpoint's provenance.json; None if not recorded."""
    name = resolve(model)
    path = Path(name) / PROVENANCE
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, PROVENANCE))
        except EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    counts = json.loads(path.read_text(encoding="utf-8")).get("training_code_counts")
    if counts is not None and not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{path.name}: training_code_counts must be whole numbers of at least 0")
    return counts
