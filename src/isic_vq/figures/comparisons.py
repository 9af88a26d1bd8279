"""Draw comparisons: values with intervals side by side, curves over a setting, codes by group. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator

from .plots import BLUE, DPI, INK, PALETTE, finish, new_figure


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


def dots(groups: Mapping[str, Sequence[Point]], title: str, unit: str, line: float | None = None) -> Figure:
    """Draw values as dots with whiskers, one below the other, group by group, and a vertical line such as their mean."""
    number = sum(len(points) + 1 for points in groups.values())
    figure = Figure(figsize=(8, 1.2 + 0.27 * number), dpi=DPI, layout="constrained")
    axes = figure.subplots()
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
) -> Figure:
    """Draw panels (title, unit, curves) over one setting on a logarithmic axis; their curves share one legend."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, (title, unit, drawn) in zip(all_axes, panels, strict=False):
        for index, curve in enumerate(drawn):
            color = PALETTE[index % len(PALETTE)]
            for seed in curve.each:
                axes.plot(curve.x, seed, "o", color=color, markersize=4, alpha=0.45)
            axes.plot(curve.x, curve.y, color=color, linewidth=1.8, label=curve.label)
        finish(axes, title, x, unit, legend=False)
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
    figure, (axes,) = new_figure(10, 1.6 + 0.3 * len(table), panels=1)
    ratios = np.log2(shares / mean)[:, order]
    shown = axes.imshow(ratios, "RdBu_r", aspect="auto", vmin=-3, vmax=3, interpolation="nearest")
    finish(axes, title, "codes, the most used first", "", legend=False)
    axes.set_yticks(range(len(table)), [name.replace("_", " ") for name in counts])
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, label="log2 of share / mean share")
    return figure
