"""Write every figure a run has the data for, each with its numbers beside it.

Figures of the report this project reproduces (its section 2): reconstructed images, use of the codebook's vectors,
loss per epoch and per batch of the VQ-VAE, loss of the PixelCNN, generated images. Differs from it: the prior's loss
is drawn per batch too, and in bits per code (its loss is a mean cross-entropy in nats per code) so that codebooks of
different sizes can be compared.

Reconstructions show source images, whose licence and subjects differ from the model's: they stay in the run's folder
whatever the output folder is.
"""

import csv
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isic_vq.files import write_atomically

from . import numbers
from .grid import check_images, enlarge, image_grid, paired_grid
from .runs import MissingPartError, Run, find_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

TITLES = {"vqvae": "VQ-VAE", "prior": "Prior", "decoder": "Decoder", "classifier": "Classifier"}
UNITS = {"prior": ("bits per code", 1 / numbers.NATS_PER_BIT)}  # of the loss, and its factor
MAX_PICTURES = 64

FORMULA = ("=", "+", "-", "@", "\t", "\n")  # what makes a spreadsheet compute a cell


@dataclass(frozen=True)
class Drawing:
    """A figure and its numbers."""

    name: str  # of its files, without suffix
    figure: "Figure"
    suffix: str  # of the file of numbers, `.csv` or `.json`
    content: bytes
    shows_source_images: bool = False  # it may not leave the run's folder


def write_figures(run_dir: Path, output_dir: Path | None = None) -> list[Path]:
    """Draw all figures of a run, or of the runs below a folder, as PNG with the numbers as CSV or JSON beside each.

    A figure whose data the run does not have is named, with the reason, in a warning of this module's logger. Of
    several runs with the same stage each gets its own folder, named like the run's path below `run_dir`.

    Args:
        run_dir: Folder with a `metrics.jsonl`, or a folder with such folders below it.
        output_dir: Folder for the figures, by default `run_dir/figures`. Reconstructions always go to the default.

    Returns:
        The files written, the numbers before their picture.

    Raises:
        FileNotFoundError: There is no such folder, or no run in it.
        ImportError: matplotlib is not installed.
        ValueError: A run has nothing to draw, or something in it is broken; the message names file and place.
    """
    runs, private_dir = find_runs(run_dir), run_dir / "figures"
    per_stage = Counter(run.stage for run in runs)
    drawings = [(run, drawing) for run in runs for drawing in draw_run(run)]
    from .plots import png_bytes

    written = []
    for run, drawing in drawings:
        folder = private_dir if output_dir is None or drawing.shows_source_images else output_dir
        if per_stage[run.stage] > 1:
            folder = folder / run.folder.relative_to(run_dir)
        for suffix, content in ((drawing.suffix, drawing.content), (".png", png_bytes(drawing.figure))):
            written.append(folder / f"{drawing.name}{suffix}")
            write_atomically(written[-1], content)
    return written


def draw_run(run: Run) -> list[Drawing]:
    """Draw the figures that the run has data for, and log why the others are missing."""
    check_matplotlib()
    from . import plots

    drawings, reasons = [], []
    for draw in FIGURES[run.stage]:
        try:
            drawings.append(draw(run, plots))
        except MissingPartError as reason:
            reasons.append(f"{draw.__name__.removeprefix('_')}: {reason}")
            logger.warning("figure not drawn: %s", reasons[-1])
    if not drawings:
        raise ValueError(
            f"{run.folder} has nothing to draw; train or evaluate it first. " + "; ".join(reasons)
        )
    return drawings


def check_matplotlib() -> None:
    """Raise ImportError with the way out where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401 - only asked for
    except ModuleNotFoundError as error:
        raise ImportError("figures need matplotlib: pip install 'isic-vq[figures]'") from error


def _batch_loss(run: Run, plots: Any) -> Drawing:
    unit, scale = UNITS.get(run.stage, ("loss", 1.0))
    columns = numbers.batch_columns(run.records("batch", "loss"), scale)
    _warn_of_gaps(run, "batch", columns["loss"])
    window = numbers.smoothing_window(len(columns["step"]))
    figure = plots.batch_loss(columns, f"{TITLES[run.stage]}: loss per batch", unit, window)
    return Drawing(f"{run.stage}_batch_loss", figure, ".csv", csv_bytes(columns))


def _epoch_loss(run: Run, plots: Any) -> Drawing:
    unit, scale = UNITS.get(run.stage, ("loss", 1.0))
    columns = numbers.epoch_columns(run.records("epoch", "train/loss"), scale)
    for key in columns:
        if key.endswith("loss"):
            _warn_of_gaps(run, f"epoch ({key})", columns[key])
    figure = plots.epoch_loss(columns, f"{TITLES[run.stage]}: loss per epoch", unit)
    return Drawing(f"{run.stage}_epoch_loss", figure, ".csv", csv_bytes(columns))


def _codebook_usage(run: Run, plots: Any) -> Drawing:
    use = numbers.CodebookUse(tuple(run.table("codebook_counts")))
    content = f"{json.dumps(use.summary(), indent=2, allow_nan=False)}\n".encode()
    return Drawing("codebook_usage", plots.codebook_usage(use), ".json", content)


def _reconstructions(run: Run, plots: Any) -> Drawing:
    originals, reconstructions = run.arrays("reconstructions", "originals", "reconstructions")
    check_images(originals, f"{run.folder}: originals")
    check_images(reconstructions, f"{run.folder}: reconstructions")
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"{run.folder}: originals and reconstructions must have one shape, "
            f"got {originals.shape} and {reconstructions.shape}; evaluate the run again"
        )
    columns = numbers.reconstruction_columns(originals, reconstructions)
    picture, centers = paired_grid(enlarge(originals[:MAX_PICTURES]), enlarge(reconstructions[:MAX_PICTURES]))
    rows = [row for upper, lower in centers for row in ((upper, "original"), (lower, "reconstruction"))]
    figure = plots.picture(picture, f"Reconstructions ({_count_text(len(originals))})", rows)
    name = "reconstructions" if run.stage == "vqvae" else f"{run.stage}_reconstructions"
    return Drawing(name, figure, ".csv", csv_bytes(columns), shows_source_images=True)


def _generated_images(run: Run, plots: Any) -> Drawing:
    images, labels = run.arrays("samples", "images", "labels")
    check_images(images, f"{run.folder}: images of samples")
    names = run.table("sample_labels")
    if not len(names) == len(labels) == len(images):
        raise ValueError(
            f"{run.folder}: samples must have one label and one name per image, "
            f"got {len(images)} images, {len(labels)} labels and {len(names)} names; evaluate the run again"
        )
    diagnoses = [str(name) for name in names[:MAX_PICTURES]]
    grid = image_grid(enlarge(images[:MAX_PICTURES]), labels=diagnoses, padding=6)
    columns = {"image": list(range(len(images))), "label": labels.tolist(), "name": names}
    figure = plots.picture(grid, f"Generated images ({_count_text(len(images))})")
    return Drawing("generated_images", figure, ".csv", csv_bytes(columns))


FIGURES = {  # by stage
    "vqvae": (_batch_loss, _epoch_loss, _codebook_usage, _reconstructions),
    "prior": (_batch_loss, _epoch_loss, _generated_images),
    "decoder": (_batch_loss, _epoch_loss, _reconstructions),
    "classifier": (_batch_loss, _epoch_loss),
}


def _count_text(number: int) -> str:
    return f"n = {number}" if number <= MAX_PICTURES else f"n = {number}, the first {MAX_PICTURES} shown"


def _warn_of_gaps(run: Run, name: str, values: Sequence[float]) -> None:
    if gaps := int(np.sum(~np.isfinite(values))):  # the curve leaves them out
        logger.warning(
            "%s: %d of %d %s losses are missing or not finite", run.folder, gaps, len(values), name
        )


def csv_bytes(columns: numbers.Columns) -> bytes:
    """A table as CSV with full precision; a cell without a value (NaN) is empty.

    Text that a spreadsheet would compute begins with an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(map(_cell, row))
    return buffer.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        value = value.replace("\r", "\n")  # which the writer quotes
        return f"'{value}" if value.startswith(FORMULA) else value
    return "" if isinstance(value, float) and math.isnan(value) else value
