"""Curves of a utility report: gain of AUC over the number of real images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isic_vq.evaluation.report import Report
from isic_vq.files import write_atomically

if TYPE_CHECKING:
    from isic_vq.figures.plots import Curve


def write_gain_curves(report: Report, path: Path) -> list[Path]:
    """Write plots beside a report, atomically: `NAME-generated.png`, a panel for each test and mix, and `NAME-real.png` of the baselines.

    Args:
        report: of `isic_vq.evaluation.utility.utility_report`.
        path: of the report.
    """
    from .plots import curves, png_bytes

    rows = report.tables["comparisons"]
    tests = list(dict.fromkeys(row["test"] for row in rows))
    numbers = sorted({row["real"] for row in rows})
    positive, unit = report.model["positive"], "gain of AUC"
    mark = "SMOKE RUN: not a result" if report.model["smoke"] else None
    mixes = {"same mix": "same mix of diagnoses", "rare alone": f"{positive} alone"}
    generated = [
        (f"{title}, tested on {test}", unit, ratios)
        for mix, title in mixes.items()
        for test in tests
        if (ratios := gain_curves([row for row in rows if row["test"] == test and row["added"] == mix], True))
    ]
    real = [
        (f"real images alone, tested on {test}", unit, gain_curves(mine, False))
        for test in tests
        if (mine := [row for row in rows if row["test"] == test and not row["added"]])
    ]
    written = []
    for name, panels in (("generated", generated), ("real", real)):
        if panels:
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            figure = curves(panels, "real images", numbers, mark, line=0.0, columns=len(tests))
            write_atomically(written[-1], png_bytes(figure))
    return written


def gain_curves(rows: Sequence[dict[str, Any]], by_ratio: bool) -> "list[Curve]":
    """A curve for each ratio, or for each arm, of comparisons of one test."""
    from .plots import Curve

    drawn: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["ratio"], row["real"])):
        drawn.setdefault(f"{row['ratio']} generated per real image" if by_ratio else row["name"], []).append(
            row
        )
    return [
        Curve(
            label,
            [row["real"] for row in mine],
            [row["value"] for row in mine],
            intervals=[row["interval"] for row in mine],
        )
        for label, mine in drawn.items()
    ]
