"""Pictures of the closest pairs of an audit: a sample, and beside it the training image it is nearest to.

They may show patients' images. Write them into a folder that is never published.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isic_vq.data.augmentation import dihedral
from isic_vq.data.classes import AUTO, Classes
from isic_vq.data.loading import iter_batches
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.evaluation.audit import Audit
from isic_vq.evaluation.measured_images import BATCH_SIZE
from isic_vq.figures.grid import enlarge, image_grid
from isic_vq.figures.png import write_png
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

PAIRS_PER_ROW = 4


def write_pairs(audit: Audit, folder: Path, train_images: str | None = None) -> list[Path]:
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
def pair_images(audit: Audit, channel: str, train_images: str | None = None) -> tuple[Tensor, Tensor]:
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
