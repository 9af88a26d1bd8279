"""The numbers that the figures show, computed from a run's records; no drawing.

Smoothing is a centred moving mean, cut off at both ends. Differs from W&B's exponential average, which lags behind a
falling loss and so shows it too high.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NATS_PER_BIT = math.log(2)
SPLITS = ("train", "validation", "averaged")

Columns = dict[str, list[Any]]


def column(records: Iterable[dict[str, Any]], key: str, scale: float = 1.0) -> np.ndarray:
    """The value of each record times `scale`, float64, NaN where a record lacks it."""
    return np.array([record.get(key, math.nan) for record in records], dtype=np.float64) * scale


def smoothing_window(number: int) -> int:
    """Window for a curve of that many points: about a fiftieth of it, an odd number."""
    return number // 100 * 2 + 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value `(N,)` with its (window - 1) / 2 finite neighbours on either side, `window` odd.

    NaN where the value itself is not finite.
    """
    finite = np.isfinite(values)
    kept = np.where(finite, values, 0.0), finite.astype(float)
    reach = window // 2
    sums, counts = (np.convolve(part, np.ones(window))[reach : reach + len(values)] for part in kept)
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def batch_columns(records: Sequence[dict[str, Any]], scale: float = 1.0) -> Columns:
    """Step, epoch, loss and smoothed loss of every optimizer step, the losses times `scale`."""
    loss = column(records, "loss", scale)
    return {
        "step": [record["step"] for record in records],
        "epoch": [record["epoch"] for record in records],
        "loss": loss.tolist(),
        "smoothed_loss": smooth(loss, smoothing_window(len(loss))).tolist(),
    }


def epoch_columns(records: Sequence[dict[str, Any]], scale: float = 1.0) -> Columns:
    """Step, epoch and, times `scale`, the loss and every `*_loss` of each split per epoch; losses in the order of `SPLITS`."""

    def place(key: str) -> tuple[bool, int, str, str]:
        split, _, name = key.partition("/")
        return name != "loss", SPLITS.index(split) if split in SPLITS else len(SPLITS), split, name

    keys = {key for record in records for key in record if key.endswith(("/loss", "_loss"))}
    steps: Columns = {key: [record[key] for record in records] for key in ("step", "epoch")}
    return steps | {key: column(records, key, scale).tolist() for key in sorted(keys, key=place)}


@dataclass(frozen=True)
class CodebookUse:
    """How often each code of a codebook occurs."""

    counts: tuple[int, ...]  # K integers

    def __post_init__(self) -> None:
        if any(type(count) is not int or count < 0 for count in self.counts) or sum(self.counts) == 0:
            raise ValueError(f"codebook_counts must be counts with a sum above 0, got {self.counts!r:.120}")

    @classmethod
    def count(cls, codes: np.ndarray, num_codes: int) -> "CodebookUse":
        """Count codes, integers of any shape in [0, num_codes)."""
        return cls(tuple(np.bincount(codes.ravel(), minlength=num_codes).tolist()))

    @property
    def perplexity(self) -> float:
        import torch  # here: figures are read and laid out without it

        from isic_vq.models.vector_quantizer import usage_and_perplexity

        return usage_and_perplexity(torch.tensor(self.counts))[1]

    @property
    def num_used(self) -> int:
        return sum(count > 0 for count in self.counts)

    def most_used(self) -> list[tuple[int, int]]:
        """(code, count) of the codes that occur, most frequent first, lowest code first on ties."""
        order = np.argsort(-np.array(self.counts), kind="stable")[: self.num_used].tolist()
        return [(code, self.counts[code]) for code in order]

    def summary(self) -> dict[str, Any]:
        """The numbers of the figure as JSON: sizes are numbers of codes, `usage_percent` is in [0, 100]."""
        return {
            "num_codes": len(self.counts),
            "num_tokens": sum(self.counts),
            "num_used": self.num_used,
            "usage_percent": 100 * self.num_used / len(self.counts),
            "perplexity": self.perplexity,
            "counts": list(self.counts),
        }


def reconstruction_columns(originals: np.ndarray, reconstructions: np.ndarray) -> Columns:
    """Mean absolute error in [0, 1] and PSNR in dB (infinite for an exact copy) of RGB images `(N, H, W, 3)`, uint8."""
    import torch

    from isic_vq.evaluation.measures import psnr

    images, others = (torch.from_numpy(pixels).double() / 255 for pixels in (originals, reconstructions))
    return {
        "image": list(range(len(originals))),
        "mean_absolute_error": (images - others).abs().mean(dim=(1, 2, 3)).tolist(),
        "psnr_db": psnr(images, others).tolist(),
    }
