"""Pictures of an evaluation (its page with the atlas of codes, the worst reconstructions) and of an audit's closest pairs.

Reconstructions and pairs may show patients' images. Write them into a folder that is never published.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from isic_vq.data.augmentation import dihedral
from isic_vq.data.classes import AUTO, Classes
from isic_vq.data.loading import iter_batches
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.evaluation.codebook import code_atlas
from isic_vq.evaluation.measured_images import BATCH_SIZE, worst_reconstructions
from isic_vq.figures.grid import enlarge, image_grid, paired_grid
from isic_vq.figures.png import png_content, write_png
from isic_vq.figures.report_page import PICTURES, Plot, write_report_page
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

if TYPE_CHECKING:
    from isic_vq.evaluation.audit import Audit
    from isic_vq.evaluation.evaluate import Evaluation

ATLAS_COLUMNS = 32
GALLERY_SIZE = 16
PAIRS_PER_ROW = 4


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


def write_pairs(audit: "Audit", folder: Path, train_images: str | None = None) -> list[Path]:
    """Write the closest pairs of every channel side by side, a PNG for each.

    Raises:
        DataError: as `pair_images`.
    """
    paths = []
    for channel in audit.pairs:
        both = torch.stack(pair_images(audit, channel, train_images), dim=1).flatten(0, 1)
        pixels = np.asarray(IsicVQImageProcessor().postprocess(both, output_type="np"))
        labels = []
        for pair in audit.shown_pairs(channel):
            sample = f"{audit.samples.names[pair.sample]}{' found' if pair.found else ''}"
            labels += [sample, f"{audit.train.isic_ids[pair.row]} {pair.distance:.3g}"]
        grid = image_grid(enlarge(pixels), columns=2 * PAIRS_PER_ROW, labels=labels)
        title, comment = "samples and their nearest training images", f"closest pairs by {channel}"
        paths.append(folder / f"{channel.replace('/', '-')}.png")
        write_png(grid, paths[-1], {"Title": title, "Comment": comment})
    return paths


@torch.inference_mode()
def pair_images(audit: "Audit", channel: str, train_images: str | None = None) -> tuple[Tensor, Tensor]:
    """The shown pairs of a channel: decoded samples, and training images in the dihedral view that is nearest.

    Both are `(P, 3, H, W)` in [0, 1], on the CPU. Without a source of `train_images` their codes are decoded.
    """
    pairs, model = audit.shown_pairs(channel), audit.model
    chosen = audit.samples.codes[[pair.sample for pair in pairs]]
    samples = model.decode(chosen.to(model.device)).float().cpu()
    rows = [pair.row for pair in pairs]
    if train_images is None:
        images = model.decode(audit.train.first_views()[rows].to(model.device)).float().cpu()
    else:
        images = named_images(train_images, [audit.train.isic_ids[row] for row in rows], samples.shape[-1])
    return samples, dihedral(images, torch.tensor([pair.view for pair in pairs]))


def named_images(uri: str, names: Sequence[str], size: int) -> Tensor:
    """Images of a source by their ids, `(len(names), 3, size, size)` in [0, 1]."""
    source = find_source(uri, Classes.parse(AUTO))
    wanted, processor = set(names), IsicVQImageProcessor(size=size)
    records = source.records()
    if source.has_random_access:
        rows = [row for row, entry in enumerate(source.metadata()) if entry["isic_id"] in wanted]
        records = source.dataset().select(rows)
    images: dict[str, Tensor] = {}
    for batch in iter_batches(records, processor, BATCH_SIZE):
        pairs = zip(batch["isic_ids"], batch["pixel_values"], strict=True)
        images |= {name: pixels for name, pixels in pairs if name in wanted}
    if missing := wanted - images.keys():
        raise DataError(f"{source.name} lacks {len(missing)} of the images to show, such as {min(missing)}")
    return torch.stack([images[name] for name in names])
