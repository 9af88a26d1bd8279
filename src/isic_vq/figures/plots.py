"""Draw numbers and pictures as matplotlib figures; the only module that touches matplotlib.

Every function takes finished numbers and returns a new `Figure`: no pyplot, no global style, no file. Colours are Okabe and
Ito's palette (Color Universal Design), which colour-blind readers can tell apart; line styles repeat important differences.
An axis is logarithmic only if `use_log_scale` is true.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, MaxNLocator
from PIL import Image

from .numbers import CodebookUse, Columns

BLUE, VERMILLION = "#0072B2", "#D55E00"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
INK, GRID = "#333333", "#E3E3E3"
SPLIT_COLORS = {"train": BLUE, "validation": VERMILLION, "averaged": "#009E73"}
SPLIT_LABELS = {"averaged": "validation, averaged weights"}
LINE_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
DPI = 150
PICTURE_DPI = 100
FEW = 12  # points of a curve, up to which each has a marker


@dataclass(frozen=True)
class Point:
    """A value to show."""

    label: str
    value: float
    interval: Sequence[float] | None = None  # low and high, drawn as whiskers
    n: int | None = None  # number of items, shown beside the label


@dataclass(frozen=True)
class Curve:
    """Values over a setting."""

    label: str
    x: Sequence[float]
    y: Sequence[float]  # of several seeds, their mean
    each: Sequence[Sequence[float]] = ()  # values of every seed, a sequence per seed, drawn as dots
    intervals: Sequence[Sequence[float]] = ()  # low and high of each value, drawn as a shaded band


def batch_loss(columns: Columns, title: str, unit: str, window: int) -> Figure:
    """Draw the loss of every optimizer step and, unless the window is 1, the smoothed one over it."""
    figure, [[axes]] = new_figure(8, 4.5)
    alpha = 0.35 if window > 1 else 1.0
    (raw,) = axes.plot(
        columns["step"], columns["loss"], color=BLUE, alpha=alpha, linewidth=0.8, label="each batch"
    )
    if len(columns["step"]) <= FEW:
        raw.set(marker="o", markersize=4.5)
    if window > 1:
        label = f"mean of {window} batches"
        axes.plot(columns["step"], columns["smoothed_loss"], color=VERMILLION, linewidth=1.8, label=label)
    finish(axes, title, "optimizer step", unit, columns["loss"])
    return figure


def epoch_loss(columns: Columns, title: str, unit: str) -> Figure:
    """Draw the loss of each split per epoch and, where the loss has components, a second panel with those."""
    totals = [key for key in columns if key.endswith("/loss")]
    parts = [key for key in columns if key.endswith("_loss")]
    figure, [[axes, *others]] = new_figure(11 if parts else 8, 4.5, columns=2 if parts else 1)
    for key in totals:
        split = key.partition("/")[0]
        _line(axes, columns, key, SPLIT_COLORS.get(split, INK), "-", SPLIT_LABELS.get(split, split))
    finish(axes, title, "epoch", unit, *(columns[key] for key in totals))
    if others:
        _components(others[0], columns, parts)
        finish(others[0], "Components", "epoch", unit, *(columns[key] for key in parts), legend=False)
    return figure


def codebook_usage(use: CodebookUse) -> Figure:
    """Draw how often each code is used, by code and by rank, with the count that even use would give."""
    counts = np.array(use.counts)
    ranked = np.sort(counts)[::-1]
    even = counts.sum() / len(counts)
    figure, [[by_code, by_rank]] = new_figure(11, 4.5, columns=2)
    by_code.stairs(counts, np.arange(len(counts) + 1) - 0.5, fill=True, color=BLUE, linewidth=0)
    used = ranked[: use.num_used]
    (line,) = by_rank.plot(
        np.arange(1, len(used) + 1), used, color=BLUE, linewidth=1.8, label="codes by rank"
    )
    if len(used) <= FEW:
        line.set(marker="o", markersize=4.5)
    if unused := len(counts) - use.num_used:
        by_rank.axvspan(
            use.num_used + 0.5, len(counts) + 0.5, color=GRID, linewidth=0, label=f"{unused} unused"
        )
    for axes in (by_code, by_rank):
        axes.axhline(
            even, color=VERMILLION, linestyle="--", linewidth=1.2, label=f"even use ({even:.4g} each)"
        )
    by_code.set_ylim(bottom=0)
    finish(by_code, "By code", "code", "times used", legend=False)
    finish(by_rank, "By rank", "rank", "times used", used)
    percent = 100 * use.num_used / len(counts)
    title = f"Codebook use: K = {len(counts)}, perplexity {use.perplexity:.1f}, {percent:.1f} % of codes used"
    figure.suptitle(title, fontsize=13, color=INK)
    return figure


def heat_map(image: np.ndarray, bits: np.ndarray, title: str, most: float) -> Figure:
    """Draw an image (height, width, 3), uint8, beside the bits (h, w) of its codes; the colour scale ends at `most`."""
    figure, [[left, right]] = new_figure(6.4, 3.2, columns=2)
    _bare(left).imshow(image)
    colors = _map_bits(right, bits, most)
    figure.colorbar(colors, ax=[left, right], label="bits per code", extend="max", shrink=0.9)
    figure.suptitle(title, fontsize=10, color=INK, parse_math=False)
    return figure


def likelihood_extremes(
    rows: Sequence[tuple[str, Sequence[tuple[np.ndarray, np.ndarray, str]]]], most: float
) -> Figure:
    """Draw rows of images, each above the bits of its codes."""
    number = max(len(cells) for _, cells in rows)
    figure, panels = new_figure(1.35 * number + 1.6, 3.2 * len(rows), number, 2 * len(rows))
    for axes in panels.flat:
        _bare(axes)
    for (name, cells), above, below in zip(rows, panels[::2], panels[1::2], strict=True):
        above[0].set_ylabel(name, fontsize=11, color=INK)
        below[0].set_ylabel("bits", fontsize=11, color=INK)
        for (image, bits, caption), shown, mapped in zip(cells, above, below, strict=False):
            shown.imshow(image)
            shown.set_title(caption, fontsize=8, color=INK, parse_math=False)
            colors = _map_bits(mapped, bits, most)
    figure.colorbar(colors, ax=panels, label="bits per code", extend="max", shrink=0.6)
    return figure


def score_histograms(histograms: dict[str, Any], areas: dict[tuple[str, str], float], usual: str) -> Figure:
    """Draw the histogram (`edges` and `counts` by kind) of every score and kind of unusual images over the usual ones'."""
    kinds = list(dict.fromkeys(kind for _, kind in areas))
    columns, rows = len(histograms), len(kinds)
    figure, panels = new_figure(3.1 * columns + 0.6, 1.6 * rows + 0.8, columns, rows, sharex="col")
    for column, (score, histogram) in zip(panels.T, histograms.items(), strict=True):
        for axes, kind in zip(column, kinds, strict=True):
            for shown, color in ((usual, GRID), (kind, BLUE)):
                counts = np.array(histogram["counts"][shown])
                shares = counts / counts.sum()
                axes.stairs(shares, histogram["edges"], fill=shown == usual, color=color, linewidth=1.4)
            axes.set_title(
                f"{_words(kind)}: AUROC {areas[score, kind]:.2f}", fontsize=10, color=INK, loc="left"
            )
            axes.set_yticks([])
            axes.tick_params(labelsize=9, colors=INK, length=3)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(INK)
        column[-1].set_xlabel(_words(score), fontsize=11, color=INK)
    title = f"Scores of unusual images (blue) and {_words(usual)} ones (grey), in bits per code"
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def picture(image: Image.Image, title: str, rows: Sequence[tuple[int, str]] = ()) -> Figure:
    """Put a title above a picture and text left of its rows (their centre in pixels from the top), pixel for pixel."""
    pixels = np.asarray(image)
    left, top, margin = (140 if rows else 16), 48, 16
    width, height = max(left + pixels.shape[1] + margin, 480), top + pixels.shape[0] + margin
    figure = Figure(figsize=(width / PICTURE_DPI, height / PICTURE_DPI), dpi=PICTURE_DPI)
    figure.figimage(pixels, xo=left, yo=margin, origin="upper")
    figure.text(left / width, 1 - top / 2 / height, title, fontsize=13, color=INK, va="center")
    for center, text in rows:
        y = 1 - (top + center) / height
        figure.text((left - 10) / width, y, text, fontsize=10.5, color=INK, ha="right", va="center")
    return figure


def dots(groups: Mapping[str, Sequence[Point]], title: str, unit: str, line: float | None = None) -> Figure:
    """Draw values as dots with whiskers, one below the other, group by group, and a vertical line such as their mean."""
    number = sum(len(points) + 1 for points in groups.values())
    figure, [[axes]] = new_figure(8, 1.2 + 0.27 * number)
    ticks, labels, row = [], [], 0
    for group, points in groups.items():
        axes.text(
            0, row, f"{group}  ", transform=axes.get_yaxis_transform(), ha="right", va="center", color=INK,
            fontweight="bold", fontsize=10,
        )  # fmt: skip
        row += 1
        for point in points:
            if point.interval is not None:
                axes.plot(point.interval, [row, row], color=BLUE, linewidth=1.6, solid_capstyle="butt")
            axes.plot(point.value, row, "o", color=BLUE, markersize=5)
            ticks.append(row)
            labels.append(point.label if point.n is None else f"{point.label} (n = {point.n:,})")
            row += 1
    if line is not None:
        axes.axvline(line, color=INK, linewidth=1, linestyle=":")
    finish(axes, title, unit, "", legend=False)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.set_yticks(ticks, labels)
    axes.set_ylim(row - 0.4, -0.8)
    axes.grid(visible=False, axis="y")
    return figure


def curves(
    panels: Sequence[tuple[str, str, Sequence[Curve]]],
    x: str,
    x_values: Sequence[float],
    mark: str | None = None,
    line: float | None = None,
    columns: int = 3,
) -> Figure:
    """Draw panels (title, unit, curves) over one setting on a logarithmic axis, with a horizontal line such as 0.

    Their curves share one legend, the first panel's.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = new_figure(4.4 * columns, 3.6 * rows, columns, rows)
    all_axes = grid.ravel()
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, (title, unit, drawn) in zip(all_axes, panels, strict=False):
        for index, curve in enumerate(drawn):
            color = PALETTE[index % len(PALETTE)]
            for seed in curve.each:
                axes.plot(curve.x, seed, "o", color=color, markersize=4, alpha=0.45)
            if curve.intervals:
                lows, highs = zip(*curve.intervals, strict=True)
                axes.fill_between(curve.x, lows, highs, color=color, alpha=0.15, linewidth=0)
            marker = "o" if curve.intervals else None
            axes.plot(
                curve.x, curve.y, color=color, linewidth=1.8, marker=marker, markersize=4, label=curve.label
            )
        finish(axes, title, x, unit, legend=False)
        if line is not None:
            axes.axhline(line, color=INK, linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(list(x_values), [f"{value:g}" for value in x_values])
        axes.minorticks_off()
    if mark is not None:
        figure.suptitle(mark, color=INK)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def code_use_by_group(counts: Mapping[str, Sequence[int]], title: str) -> Figure:
    """Draw log2 of each group's share of each code over the mean share of all groups, from K uses by group.

    Codes are in the order of their use over all groups, the most used one first; every count is one more than the uses, so
    that unused codes are not infinitely rare.
    """
    table = np.array(list(counts.values()), dtype=np.float64) + 1
    shares = table / table.sum(axis=1, keepdims=True)
    mean = shares.mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    figure, [[axes]] = new_figure(10, 1.6 + 0.3 * len(table))
    ratios = np.log2(shares / mean)[:, order]
    shown = axes.imshow(ratios, "RdBu_r", aspect="auto", vmin=-3, vmax=3, interpolation="nearest")
    finish(axes, title, "codes, the most used first", "", legend=False)
    axes.set_yticks(range(len(table)), [name.replace("_", " ") for name in counts])
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, label="log2 of share / mean share")
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Render a figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=figure.dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def use_log_scale(values: np.ndarray) -> bool:
    """Whether values differ so much (a factor of 30) that a linear axis would hide the small ones.

    Zeros do not count, though a logarithmic axis cannot show them: a part of the loss that is off at first is zero.
    """
    positive = values[values > 0]
    return bool(len(positive) and (values >= 0).all() and positive.max() > 30 * positive.min())


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure of that size in inches and its panels, an array (rows, columns) of axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _bare(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _map_bits(axes: Axes, bits: np.ndarray, most: float) -> AxesImage:
    return _bare(axes).imshow(bits, cmap="magma", vmin=0, vmax=most, interpolation="nearest")


def _line(axes: Axes, columns: Columns, key: str, color: str, style: str, label: str) -> None:
    """Draw one value per epoch, joined over the epochs that lack it, with markers where the epochs are few."""
    points = [(x, y) for x, y in zip(columns["epoch"], columns[key], strict=True) if math.isfinite(y)]
    epochs, values = zip(*points, strict=True) if points else ((), ())
    (line,) = axes.plot(epochs, values, color=color, linestyle=style, linewidth=1.8, label=label)
    if len(points) <= FEW:
        line.set(marker="o", markersize=4.5, markerfacecolor=color if style == "-" else "white")


def _components(axes: Axes, columns: Columns, keys: Iterable[str]) -> None:
    """Draw the loss's components: one colour per component, one line style per split.

    The legend stands beside the panel: its many entries would cover lines.
    """
    pairs = [tuple(key.split("/", 1)) for key in keys]
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(n for _, n in pairs))}
    styles = {
        split: LINE_STYLES[i % len(LINE_STYLES)] for i, split in enumerate(dict.fromkeys(s for s, _ in pairs))
    }
    for split, name in pairs:
        _line(axes, columns, f"{split}/{name}", colors[name], styles[split], "")
    names = [Line2D([], [], color=color, linewidth=3, label=_words(name)) for name, color in colors.items()]
    splits = [
        Line2D([], [], color=INK, linestyle=style, label=SPLIT_LABELS.get(split, split))
        for split, style in styles.items()
    ]
    legend_of(axes, [*names, *splits], loc="upper left", bbox_to_anchor=(1, 1))


def _words(name: str) -> str:
    return name.removesuffix("_loss").replace("_", " ")


def finish(axes: Axes, title: str, x: str, y: str, *values: Iterable[Any], legend: bool = True) -> None:
    """Give a panel its texts, light grid and scale, the last from the values it shows."""
    shown = np.array([value for group in values for value in group if math.isfinite(value)], dtype=np.float64)
    if use_log_scale(shown):
        axes.set_yscale("log", nonpositive="mask")
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=11, color=INK)
    axes.set_ylabel(y, fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=10, colors=INK, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    if legend:
        legend_of(axes, axes.get_legend_handles_labels()[0])


def legend_of(axes: Axes, handles: list[Any], **place: Any) -> None:
    """Add a legend that hides the grid behind it, but draws no box."""
    style: dict[str, Any] = {
        "facecolor": "white",
        "edgecolor": "none",
        "framealpha": 0.9,
        "fontsize": 10,
        "labelcolor": INK,
    }
    axes.legend(handles=handles, **style, **place)
