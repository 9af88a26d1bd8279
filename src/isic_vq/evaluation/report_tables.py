"""A report's numbers as tables, one per topic, for pages and model cards."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from isic_vq.evaluation.report import Metric, Report

APPEARANCE = "Sharpness, grids and coherence"
GENERATED = "Generated images"
TOPICS = {  # titles, and how the names of their metrics begin
    "Reconstruction": ("psnr", "ssim", "ms_ssim", "l1", "mse", "lpips"),
    APPEARANCE: ("texture", "grid_power_", "octave_power", "coherence"),
    "Codebook": ("usage", "perplexity", "dead_codes"),
    "Likelihood": ("bits_per_", "conditioning_", "likelihood_balanced_accuracy"),
    GENERATED: ("frechet_", "kernel_", "precision", "recall", "density", "coverage", "agreement"),
    "Memorisation": (
        "nearest_",
        "near_samples",
        "pairs_found",
        "held_out_",
        "membership_",
        "likelihood_gap",
    ),
    "Worth to a classifier": ("balanced_accuracy", "auc", "melanoma_auc", "sensitivity"),
    "Told apart by a classifier": ("two_sample_",),
    "Cost": ("parameters", "weight_bytes", "bytes_per_image", "seconds_per_image"),
}
OTHER = "Other measurements"


def report_lines(report: Report) -> list[str]:
    """A report's metrics, a line each; those of parts of a data set are left to its file."""
    shown = [metric for metric in report.metrics if metric.group is None]
    width = max(28, *(len(metric.text) for metric in shown))
    lines = []
    for metric in shown:
        value, interval = rounded(metric)
        unit = "" if metric.unit == "1" else metric.unit
        lines.append(
            f"  {metric.text:<{width}} {value:>10} {f'({interval})' if interval else '':<20} {unit:<30} {metric.split}, "
            f"n = {metric.n}"
        )
    return lines


@dataclass
class Table:
    """The numbers of one topic."""

    title: str
    columns: list[str] = field(default_factory=list)  # what numbers were measured on
    # By name and unit, then by column.
    rows: dict[tuple[str, str], dict[str, Metric]] = field(default_factory=dict)


def topic_of(metric: Metric) -> str:
    """The title of the table that shows a metric."""
    return next((topic for topic, names in TOPICS.items() if metric.name.startswith(names)), OTHER)


def number_text(value: float) -> str:
    """A number rounded for reading: three digits, or all before the point; all of an integer."""
    if type(value) is int:
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def rounded(metric: Metric) -> tuple[str, str | None]:
    """A metric's value and its interval for reading, to the one or two digits that the interval's half-width has.

    Two digits of a half-width that begins with 1, 2 or 3 (up to 3.54, as the Particle Data Group rounds), one of others.
    """
    low, high = metric.interval or (0.0, 0.0)
    if low == high:
        return number_text(metric.value), number_text(low) if metric.interval else None
    digits = max(0, -math.floor(math.log10((high - low) / 2 / 3.55)))
    value = number_text(metric.value) if type(metric.value) is int else f"{metric.value:z,.{digits}f}"
    return value, f"{low:z,.{digits}f} to {high:z,.{digits}f}"


def report_tables(metrics: Iterable[Metric], measured_on: Callable[[Metric], str]) -> list[Table]:
    """Arrange metrics of whole data sets by topic; those of groups of images (`Metric.group`) are left out.

    `measured_on` is the head of a metric's column. Kinds of images that one yardstick compares, such as floor and samples,
    are columns of one row: `frechet_distance` with the labels images=samples and yardstick=NAME is in the row
    `frechet_distance, NAME`. Tables are in the order of `TOPICS`, without empty ones.

    Raises:
        ValueError: one cell has two values.
    """
    tables = {title: Table(title) for title in (*TOPICS, OTHER)}
    for metric in metrics:
        if metric.group is not None:
            continue
        name, column = metric.text, measured_on(metric)
        table = tables[topic_of(metric)]
        if table.title in (APPEARANCE, GENERATED) and "images" in metric.labels:
            more = [text for key, text in metric.labels.items() if key != "images"]
            name, column = ", ".join([metric.name, *more]), f"{metric.labels['images']}: {column}"
        row = table.rows.setdefault((name, "" if metric.unit == "1" else metric.unit), {})
        if column in row:
            raise ValueError(
                f"there are two values of {metric.text} of {column}: keep one of the two reports"
            )
        row[column] = metric
        if column not in table.columns:
            table.columns.append(column)
    return [table for table in tables.values() if table.rows]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; its first `texts` columns are text, the others numbers."""
    lines = [head, [*["---"] * texts, *["---:"] * (len(head) - texts)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
