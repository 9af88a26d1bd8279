"""Pictures of scores: heat maps of bits, the most and the least likely images, and histograms of a report's scores.

Colours of bits run from 0 to one and a half times log2 K, the bits of a code under a flat distribution: one scale for all images
of a model. Heat maps show source images; where they are written is the caller's responsibility.
"""

import itertools
import math
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from operator import attrgetter
from pathlib import Path

import numpy as np

from isic_vq.evaluation.report import Report
from isic_vq.files import write_atomically

MAX_EXTREMES = 8
NAME_LENGTH = 18  # characters that fit over an image


@dataclass(frozen=True)
class HeatMap:
    """An image and the bits of its codes."""

    name: str
    image: np.ndarray  # RGB of shape (height, width, 3), uint8
    bits: np.ndarray  # of every code, shape (h, w)
    bits_per_code: float


class Gallery:
    """Collects images one by one, and keeps those to show: heat maps of the first `limit`; 0 writes no picture at all."""

    def __init__(self, num_codes: int, limit: int):
        self.most, self.limit, self.num_images = 1.5 * math.log2(num_codes), limit, 0
        self.first: list[HeatMap] = []
        self.likely: list[HeatMap] = []
        self.unlikely: list[HeatMap] = []

    def add(self, name: str, image: np.ndarray, bits: np.ndarray, bits_per_code: float) -> None:
        shown = HeatMap(name, image, bits, bits_per_code)
        self.num_images += 1
        if self.num_images <= self.limit:
            self.first.append(shown)
        self.likely = nsmallest(MAX_EXTREMES, [*self.likely, shown], attrgetter("bits_per_code"))
        self.unlikely = nlargest(MAX_EXTREMES, [*self.unlikely, shown], attrgetter("bits_per_code"))

    def write(self, folder: Path) -> None:
        """Write `heat-00000.png` and so on, and `overview.png` of two images or more, each atomically."""
        if self.limit == 0:
            return
        from .plots import heat_map, likelihood_extremes, png_bytes

        for index, shown in enumerate(self.first):
            title = f"{shown.name[-60:]}: {shown.bits_per_code:.3f} bits per code"
            figure = heat_map(shown.image, shown.bits, title, self.most)
            write_atomically(folder / f"heat-{index:05d}.png", png_bytes(figure))
        if half := self.num_images // 2:  # no image is among both the most and the least likely
            rows = [("most likely", self.likely[:half]), ("least likely", self.unlikely[:half])]
            cells = [
                (title, [(m.image, m.bits, f"{m.name[-NAME_LENGTH:]}\n{m.bits_per_code:.2f}") for m in maps])
                for title, maps in rows
            ]
            write_atomically(folder / "overview.png", png_bytes(likelihood_extremes(cells, self.most)))


def write_score_histograms(report: Report, path: Path) -> None:
    """Write the histograms of an out-of-distribution report as one picture, atomically."""
    from .plots import png_bytes, score_histograms

    histograms, kinds = report.tables["histograms"], list(report.tables["unusual_images"])
    pairs = itertools.product(histograms, kinds)
    areas = {(score, kind): report.value("auroc", score=score, images=kind) for score, kind in pairs}
    (usual,) = set(next(iter(histograms.values()))["counts"]) - set(kinds)
    write_atomically(path, png_bytes(score_histograms(histograms, areas, usual)))
