"""A report as an HTML page: its numbers as tables, its groups and codes as plots, and given pictures.

The page links PNG files in a folder beside it and nothing else: it opens without a network, and may be published
where its pictures may. Text is escaped: anybody may name a source.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import APPEARANCE, report_tables, rounded, topic_of
from isic_vq.files import write_atomically

TEMPLATE = Path(__file__).with_name("report_page.html")
PICTURES = "Pictures"


@dataclass(frozen=True)
class Plot:
    """A plot of a report's numbers, or a picture."""

    topic: str  # title of the table that it belongs to
    name: str  # of its file, without suffix
    caption: str
    content: bytes  # the PNG file
    pixels: bool = False  # shown pixel by pixel


def write_report_page(report: Report, path: Path, pictures: Sequence[Plot] = ()) -> list[Path]:
    """Write a report's page and its pictures, each atomically; needs matplotlib and Jinja2.

    Args:
        report: as `isic-vq evaluate` makes it.
        path: the page; pictures go to a folder beside it, of its name and "-figures".
        pictures: shown beside the plots of `report_plots`; what is in them is the caller's responsibility.

    Returns:
        What was written, the page first.
    """
    from jinja2 import Environment

    folder = path.with_name(f"{path.stem}-figures")
    tables = report_tables(report.metrics, measured_on)
    shown: dict[str, list[dict[str, Any]]] = {table.title: [] for table in tables}
    written = []
    for plot in [*report_plots(report), *pictures]:
        written.append(folder / f"{plot.name}.png")
        write_atomically(written[-1], plot.content)
        title = plot.topic if plot.topic in shown else PICTURES  # a topic may have parts and no whole
        file = f"{folder.name}/{plot.name}.png"
        shown.setdefault(title, []).append({"file": file, "caption": plot.caption, "pixels": plot.pixels})
    machine = report.environment
    titles = {"isic_vq": "isic-vq", "torch": "torch", "device": "", "git_commit": "commit"}
    known = {title: machine[key] for key, title in titles.items() if machine.get(key)}
    origin = ", ".join(f"{title} {text}".strip() for title, text in known.items())
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    title = report.model.get("name", "report")
    page = template.render(
        title=title, about=origin, tables=tables, shown=shown, rounded=rounded, pictures=PICTURES
    )
    write_atomically(path, page.encode())
    return [path, *written]


def measured_on(metric: Metric) -> str:
    """What a metric was measured on, as the head of a table's column."""
    return f"{metric.split} (n = {metric.n:,})"


def file_name(name: str) -> str:
    """A metric's name as a file name: letters, digits and dashes."""
    return re.sub(r"[^\w-]+", "-", name).strip("-")


def report_plots(report: Report) -> list[Plot]:
    """Draw the numbers of parts of the images, spectra, and codes by diagnosis."""
    from isic_vq.figures.plots import Point, code_use_by_group, dots, png_bytes

    plots = []
    grouped: dict[tuple[str, str], list[Metric]] = {}
    whole = {(m.text, m.split): m.value for m in report.metrics if m.group is None}
    for metric in report.metrics:
        if metric.group is not None:
            grouped.setdefault((metric.of_all.text, metric.split), []).append(metric)
    for (name, split), metrics in grouped.items():
        points: dict[str, list[Point]] = {}
        for metric in metrics:
            column, value = metric.group or ("", "")
            point = Point(value.replace("_", " "), metric.value, metric.interval, metric.n)
            points.setdefault(column.capitalize(), []).append(point)
        mean = whole.get((name, split))
        title, unit = f"{name} of parts of {split}", metrics[0].unit
        caption = f"{title}, with 95 % intervals"
        caption += "." if mean is None else "; the dotted line is the mean over all images."
        figure = dots(points, title, name if unit == "1" else unit, mean)
        plots.append(Plot(topic_of(metrics[0]), f"{file_name(name)}-{split}", caption, png_bytes(figure)))
    plots += spectra(report)
    for split, table in report.tables.items():
        counts = table.get("codebook_counts_by_diagnosis") if isinstance(table, dict) else None
        if counts and len(counts) > 1:
            title = f"codes by diagnosis, {split}"
            caption = f"{title}: red where a diagnosis uses a code more than the diagnoses do on average."
            figure = code_use_by_group(counts, title)
            plots.append(Plot("Codebook", f"codes-{split}", caption, png_bytes(figure)))
    return plots


def spectra(report: Report) -> list[Plot]:
    """Draw the power per octave of each kind of images, a plot for each data set that has it."""
    from isic_vq.figures.plots import Curve, curves, png_bytes

    values: dict[str, dict[str, dict[int, float]]] = {}
    for metric in report.metrics:
        if metric.name == "octave_power":
            decibels = 10 * math.log10(max(metric.value, 1e-6))
            shortest = int(metric.labels["octave"].partition("-")[0])
            kinds = values.setdefault(metric.split, {})
            kinds.setdefault(metric.labels["images"], {})[shortest] = decibels
    plots = []
    for split, kinds in values.items():
        drawn = [Curve(kind, list(powers), list(powers.values())) for kind, powers in kinds.items()]
        title = f"power per octave, {split}"
        unit = "dB over one squared grey level"
        figure = curves([(title, unit, drawn)], "shortest period of the octave in pixels", drawn[0].x)
        caption = f"{title}: where a curve is below that of real images, images lack detail of that size."
        plots.append(Plot(APPEARANCE, f"spectrum-{file_name(split)}", caption, png_bytes(figure)))
    return plots
