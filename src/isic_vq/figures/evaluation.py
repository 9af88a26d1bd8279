"""Pictures of an evaluation: its page with the atlas of codes, and the worst reconstructions."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isic_vq.evaluation.codebook import code_atlas
from isic_vq.evaluation.measured_images import worst_reconstructions
from isic_vq.figures.grid import image_grid, paired_grid
from isic_vq.figures.png import png_content, write_png
from isic_vq.figures.report_page import PICTURES, Plot, write_report_page
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

if TYPE_CHECKING:
    from isic_vq.evaluation.evaluate import Evaluation

ATLAS_COLUMNS = 32
GALLERY_SIZE = 16


def atlas_picture(evaluation: "Evaluation") -> Plot:
    """The pixels that each code decodes to, in the order of use over all data sets, the most used first."""
    tables = [evaluation.report.tables[split] for split in evaluation.measured]
    counts = np.sum([table["codebook_counts"] for table in tables], axis=0)
    order = np.argsort(-counts, kind="stable")
    processor = IsicVQImageProcessor(size=evaluation.model.config.vqvae_config.image_size)
    tiles = processor.postprocess(code_atlas(evaluation.model.vqvae), output_type="np")
    caption = "what each code draws among its like, the most used first (decoder output)"
    content = png_content(image_grid(tiles[order], columns=ATLAS_COLUMNS), {"Comment": caption})
    return Plot(PICTURES, "atlas", caption, content, pixels=True)


def write_evaluation_page(evaluation: "Evaluation", path: Path) -> Path:
    """Write the page of an evaluation, which shows model outputs and plots only; see `write_report_page`."""
    return write_report_page(evaluation.report, path, [atlas_picture(evaluation)])[0]


def write_gallery(evaluation: "Evaluation", folder: Path) -> list[Path]:
    """Write the worst reconstructions of every data set under their originals, as `worst-SPLIT.png`."""
    written = []
    for split, measured in evaluation.measured.items():
        pairs = worst_reconstructions(evaluation.model, measured, GALLERY_SIZE)
        processor = IsicVQImageProcessor(size=pairs[0].shape[-1])
        originals, decoded = (processor.postprocess(images, output_type="np") for images in pairs)
        picture, _ = paired_grid(originals, decoded)
        written.append(folder / f"worst-{split}.png")
        comment = "originals above their reconstructions, the worst first: source images, not generated ones"
        write_png(picture, written[-1], {"Comment": comment})
    return written
