"""Sharpness, grids and coherence of a set of images, as lines of a report; see `isic_vq.evaluation.texture`."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval
from isic_vq.evaluation.report import Metric
from isic_vq.evaluation.texture import coherence, grid_power, octave_power, octaves, texture, third_colours
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

Statistic = Callable[[NDArray[np.float64]], float]
COLOURS = ("red", "green", "blue")
MIN_COHERENT = 3  # images: two have a correlation of 1 or -1 whatever they show


def worst_tenth(values: NDArray[np.float64]) -> float:
    """Mean of the highest tenth of numbers `(N,)`, at least one."""
    return float(np.sort(values)[-math.ceil(len(values) / 10) :].mean())


def colour_correlation(colours: NDArray[np.float64]) -> float:
    """Correlation of the columns of `(N, 2)`, as `coherence` takes it for one channel."""
    return float(coherence(torch.from_numpy(colours)[..., None])[0])


STATISTICS: dict[str, Statistic] = {  # of powers, which a few images may dominate
    "mean": lambda values: float(values.mean()),
    "median": lambda values: float(np.median(values)),
    "worst_tenth": worst_tenth,
}


class Appearance:
    """What is measured of images one by one, a batch in memory at a time.

    Args:
        downsampling: of the tokenizer, a power of two: it may weave periods of so many pixels, half as many, down to 2.
    """

    def __init__(self, downsampling: int) -> None:
        self.periods = [2**k for k in range(int(math.log2(downsampling)), 0, -1)]
        self.parts: list[tuple[Tensor, ...]] = []
        self.octaves: list[tuple[int, int]] = []

    def add(self, images: Tensor) -> None:
        """Measure square images `(B, 3, H, H)` in [0, 1], after rounding them to 8 bits."""
        images = IsicVQImageProcessor().postprocess(images, output_type="pt")
        self.octaves = octaves(images.shape[-1])
        values = (
            texture(images),
            grid_power(images, self.periods),
            octave_power(images),
            third_colours(images),
        )
        self.parts.append(tuple(value.double().cpu() for value in values))

    def metrics(self, on: MeasuredOn, seed: int, **labels: str) -> list[Metric]:
        """The report's lines: `texture`, `grid_power_mean` by period and so on, with labels that say what the images are."""
        sharpness, grids, powers, colours = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        number = len(sharpness)

        def drawn(name: str, statistic: Statistic, values: Tensor, unit: str = "1", **more: str) -> Metric:
            rows = values.numpy()
            interval = bootstrap_interval(statistic, rows, seed=seed) if number > 1 else None
            return on.metric(name, statistic(rows), unit, number, seed, interval, **labels, **more)

        lines = [on.mean("texture", sharpness, "grey levels", seed, **labels)]
        for period, values in zip(self.periods, grids.T, strict=True):
            lines += [
                drawn(f"grid_power_{name}", statistic, values, period=f"{period} px")
                for name, statistic in STATISTICS.items()
            ]
        for (low, high), values in zip(self.octaves, powers.T, strict=True):
            octave, unit = f"{low}-{high} px", "squared grey levels"
            lines.append(drawn("octave_power", STATISTICS["mean"], values, unit, octave=octave))
        if number >= MIN_COHERENT:
            for colour, values in zip(COLOURS, colours.unbind(-1), strict=True):
                lines.append(drawn("coherence", colour_correlation, values, colour=colour))
        return lines
