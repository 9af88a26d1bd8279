"""Sharpness, grids and global colour of images, to which distances between feature sets are blind.

All functions take images `(B, 3, H, W)` in [0, 1]; round them to 8 bits first to measure what a file holds. Spectra are of the
grey image (mean of R, G and B, times 255) under a Hann window, without which the step between opposite borders would show
along the axes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval
from isic_vq.evaluation.report import Metric
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

ROUNDING_POWER = 1 / 12  # variance of rounding to whole grey levels, spread evenly over all frequencies


def texture(images: Tensor) -> Tensor:
    """Mean absolute Laplacian `(B,)` in grey levels: 4 x minus its four neighbours, over channels and inner pixels."""
    pixels = 255 * images.float()
    inner = pixels[..., 1:-1, 1:-1]
    across = pixels[..., 1:-1, :-2] + pixels[..., 1:-1, 2:]
    down = pixels[..., :-2, 1:-1] + pixels[..., 2:, 1:-1]
    return (4 * inner - across - down).abs().mean(dim=(1, 2, 3))


def power_spectrum(images: Tensor) -> Tensor:
    """Power `(B, H, W)` by frequency, as `torch.fft.fft2` orders them, in squared grey levels without the mean.

    White noise of variance v has the expectation v at every frequency.
    """
    grey = 255 * images.float().mean(dim=1)
    height, width = grey.shape[1:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    window = (window / window.square().sum().sqrt()).to(grey.device)
    mean = (grey * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    return torch.fft.fft2((grey - mean) * window).abs().square()


def grid_power(images: Tensor, periods: Sequence[int]) -> Tensor:
    """Power at some periods along both axes over that of the surrounding frequencies, `(B, len(periods))`.

    Surroundings are the frequencies 2 to a sixteenth of the side away (the Hann window widens a line by one on each side),
    and their power is the median over ln 2: the mean of noise, which neighbouring lines do not move. It is at least that of
    rounding to 8 bits, so that an even image has 0. White noise has the expectation 1.

    Args:
        images: square.
        periods: in pixels, divisors of the side from 2 up: a decoder that upsamples by 8 makes grids of 8, 4 and 2.

    Raises:
        ValueError: the images are not square, or a period does not divide their side.
    """
    side = images.shape[-1]
    if images.shape[-2] != side or any(period < 2 or side % period for period in periods):
        raise ValueError(
            f"images have shape {tuple(images.shape)} and periods are {list(periods)}: expected square images of a side that "
            "every period divides"
        )
    power, reach = power_spectrum(images), max(2, side // 16)
    near = torch.arange(-reach, reach + 1)
    ring = torch.maximum(near[:, None].abs(), near.abs()) > 1
    values = []
    for period in periods:
        line = side // period
        box = (
            power[:, (near[:, None] + line) % side, near % side],
            power[:, near[:, None] % side, (near + line) % side],
        )
        ratios = [
            part[:, reach, reach]
            / (part[:, ring].median(dim=1).values / math.log(2)).clamp(min=ROUNDING_POWER)
            for part in box
        ]
        values.append(torch.stack(ratios).mean(dim=0))
    return torch.stack(values, dim=1)


def octaves(side: int) -> list[tuple[int, int]]:
    """Ranges of periods [low, high) in pixels, from (2, 4) to the last one that ends at half of an image's side."""
    return [(2**k, 2 ** (k + 1)) for k in range(1, int(math.log2(side)) - 1)]


def octave_power(images: Tensor) -> Tensor:
    """Power of square images in each of `octaves`, `(B, len(octaves(side)))`, in squared grey levels.

    The finest octave includes the corners of the spectrum, with diagonal periods below 2 pixels.
    """
    side = images.shape[-1]
    frequencies = torch.fft.fftfreq(side, device=images.device)
    radius = (frequencies[:, None].square() + frequencies.square()).sqrt()
    power = power_spectrum(images) / side**2  # the sum over all frequencies is the variance
    parts = []
    for low, high in octaves(side):
        inside = (radius > 1 / high) & (radius <= (1 / low if low > 2 else 1))
        parts.append(power[:, inside].sum(dim=1))
    return torch.stack(parts, dim=1)


def third_colours(images: Tensor) -> Tensor:
    """Mean colours `(B, 2, 3)` of the upper and the lower third of each image, in [0, 1]."""
    rows = images.shape[-2] // 3
    return torch.stack([images[:, :, :rows].mean(dim=(2, 3)), images[:, :, -rows:].mean(dim=(2, 3))], dim=1)


def coherence(colours: Tensor) -> Tensor:
    """Correlation over images between the colours of upper and lower third, `(3,)` in [-1, 1] for R, G and B.

    Args:
        colours: `(N, 2, 3)`, as `third_colours`. A channel that is the same in all images has the correlation 0.
    """
    centred = F.normalize(colours.double() - colours.double().mean(dim=0), dim=0)
    return (centred[:, 0] * centred[:, 1]).sum(dim=0)


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
    """Measures images batch by batch.

    Args:
        downsampling: of the tokenizer, a power of two: the longest period of its grids in pixels, and twice the next.
    """

    def __init__(self, downsampling: int) -> None:
        self.periods = [2**k for k in range(int(math.log2(downsampling)), 0, -1)]
        self.parts: list[tuple[Tensor, ...]] = []
        self.octaves: list[tuple[int, int]] = []

    def add(self, images: Tensor) -> None:
        """Measure square images `(B, 3, H, H)` in [0, 1], after rounding them to 8 bits."""
        images = IsicVQImageProcessor().postprocess(images, output_type="pt")
        self.octaves = octaves(images.shape[-1])
        grids = grid_power(images, self.periods)
        values = texture(images), grids, octave_power(images), third_colours(images)
        self.parts.append(tuple(value.double().cpu() for value in values))

    def metrics(self, on: MeasuredOn, seed: int, **labels: str) -> list[Metric]:
        """The report's lines: `texture`, `grid_power_mean` by period and so on, with labels of the kind of images."""
        sharpness, grids, powers, colours = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        number = len(sharpness)

        def line(name: str, statistic: Statistic, values: Tensor, unit: str = "1", **more: str) -> Metric:
            rows = values.numpy()
            interval = bootstrap_interval(statistic, rows, seed=seed) if number > 1 else None
            return on.metric(name, statistic(rows), unit, number, seed, interval, **labels, **more)

        lines = [on.mean("texture", sharpness, "grey levels", seed, **labels)]
        for period, values in zip(self.periods, grids.T, strict=True):
            lines += [
                line(f"grid_power_{name}", statistic, values, period=f"{period} px")
                for name, statistic in STATISTICS.items()
            ]
        for (low, high), values in zip(self.octaves, powers.T, strict=True):
            octave, unit = f"{low}-{high} px", "squared grey levels"
            lines.append(line("octave_power", STATISTICS["mean"], values, unit, octave=octave))
        if number >= MIN_COHERENT:
            for colour, values in zip(COLOURS, colours.unbind(-1), strict=True):
                lines.append(line("coherence", colour_correlation, values, colour=colour))
        return lines
