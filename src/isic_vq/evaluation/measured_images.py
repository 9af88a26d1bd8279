"""Measurements of every image of a data set, and their means over groups of its images."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isic_vq.data.loading import Batch, SkipCounter, collate, iter_batches
from isic_vq.data.order import seeded_subset
from isic_vq.data.schema import DataError
from isic_vq.data.sources import Source, SourceInfo
from isic_vq.data.streaming import StreamedImages
from isic_vq.evaluation.appearance import Appearance
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import MS_SSIM_MIN_SIZE, UNITS, PerceptualDistance, ms_ssim
from isic_vq.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from isic_vq.evaluation.report import GROUP_COLUMNS, Metric
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

BATCH_SIZE = 32
MIN_GROUP = 10  # images, below which a part's mean says little and may tell of single persons


@dataclass(frozen=True)
class MeasuredImages:
    """The readable images of a data set, their codes and their reconstruction."""

    source: Source
    info: SourceInfo  # what may be published about it
    indices: list[int]  # rows of the N images among all records of the source
    rows: list[dict[str, str | None]]  # `isic_id`, `diagnosis`, `source`, `sex`, `site` and so on
    labels: Tensor  # `(N,)` int64 class ids, the unconditional id for diagnoses that the model lacks
    codes: Tensor  # `(N, h, w)` int64 in [0, K)
    reconstruction: Reconstruction
    appearance: dict[str, Appearance]  # of "real" images and of "reconstructions"


def measure_images(
    model: IsicVQModel,
    source: Source,
    max_corrupt_share: float = 0.01,
    perceptual: PerceptualDistance | None = None,
    on_images: Callable[[int], object] | None = None,
) -> MeasuredImages:
    """Encode and reconstruct every image of a source, which is read once.

    `on_images` is called with the number of images of each batch. MS-SSIM is measured of images that are large enough for it,
    LPIPS if `perceptual` is given.

    Raises:
        DataError: the source cannot be read, or too many of its images are corrupt.
        ValueError: it has no images.
    """
    size = model.config.vqvae_config.image_size
    processor = IsicVQImageProcessor(size=size)
    label2id = {name: index for index, name in model.config.class_names.items()}
    all_codes, labels, indices = [], [], []
    more: dict[str, list[Tensor]] = defaultdict(list)
    real, reconstructed = (Appearance(model.config.vqvae_config.downsampling) for _ in range(2))

    def pixel_values() -> Iterator[Tensor]:
        for batch in iter_batches(source.records(), processor, BATCH_SIZE, label2id, max_corrupt_share):
            labels.append(batch["labels"])
            indices.append(batch["indices"])
            yield batch["pixel_values"]

    def measure(images: Tensor, codes: Tensor, decoded: Tensor) -> None:
        all_codes.append(codes.cpu())
        if on_images is not None:
            on_images(len(images))
        real.add(images)
        reconstructed.add(decoded)
        if size >= MS_SSIM_MIN_SIZE:
            more["ms_ssim"].append(ms_ssim(images, decoded).cpu())
        if perceptual is not None:
            more["lpips"].append(perceptual(images, decoded))

    reconstruction = evaluate_reconstruction(model.vqvae, pixel_values(), measure)
    for name, values in more.items():
        reconstruction.values[name] = torch.cat(values).double()
    rows, read = list(source.metadata()), torch.cat(indices).tolist()
    return MeasuredImages(
        source=source,
        info=source.describe(),
        indices=read,
        rows=[rows[index] for index in read],
        labels=torch.cat(labels),
        codes=torch.cat(all_codes),
        reconstruction=reconstruction,
        appearance={"real": real, "reconstructions": reconstructed},
    )


def class_ids(model: IsicVQModel, diagnoses: Sequence[str]) -> Tensor:
    """Class ids `(N,)` int64, the unconditional id for a diagnosis that the model does not have."""
    ids = {name: index for index, name in model.config.class_names.items()}
    return torch.tensor([ids.get(name, len(ids)) for name in diagnoses])


def sampled_images(
    source: Source, processor: IsicVQImageProcessor, limit: int, seed: int, max_corrupt_share: float
) -> Iterator[Tensor]:
    """Batches `(B, 3, H, W)` of at most `limit` images of a source, drawn by seed; in the source's order if it can be."""
    if source.has_random_access:
        records = source.dataset()
        chosen = records.select(sorted(seeded_subset(len(records), limit, seed).tolist()))
        batches = iter_batches(chosen, processor, BATCH_SIZE, max_corrupt_share=max_corrupt_share)
    else:
        batches = _streamed_sample(source, processor, limit, seed, max_corrupt_share)
    num_images = 0
    for batch in batches:
        num_images += len(batch["pixel_values"])
        yield batch["pixel_values"]
    if num_images == 0:
        raise DataError(f"{source.name} holds no readable image")


def _streamed_sample(
    source: Source, processor: IsicVQImageProcessor, limit: int, seed: int, max_corrupt_share: float
) -> Iterator[Batch]:
    """Batches of the first images of a stream whose parts, and the images in them, are in a seeded order."""
    images = StreamedImages(source, processor, source.describe().num_images, window=limit)
    items = images.sample(limit, seed)
    counter = SkipCounter(max_corrupt_share, len(items))
    for start in range(0, len(items), BATCH_SIZE):
        batch = collate(items[start : start + BATCH_SIZE])
        counter.count(batch)
        if len(batch["indices"]):
            yield batch


def group_metrics(measured: MeasuredImages, values: dict[str, Tensor], on: MeasuredOn) -> list[Metric]:
    """The report's lines for means of values `(N,)` over the images of each diagnosis, source, sex and site.

    Images without the entry are the group "unknown". Groups of fewer than `MIN_GROUP` images are left out, and so is a
    column with one group only.
    """
    metrics = []
    for column in GROUP_COLUMNS:
        members = defaultdict(list)
        for index, row in enumerate(measured.rows):
            members[row[column] or "unknown"].append(index)
        if len(members) == 1:
            continue
        for group, indices in sorted(members.items()):
            if len(indices) >= MIN_GROUP:
                metrics += [
                    on.mean(name, numbers[indices], UNITS.get(name, "bits per code"), None, **{column: group})
                    for name, numbers in values.items()
                ]
    return metrics


def worst_reconstructions(model: IsicVQModel, measured: MeasuredImages, number: int) -> tuple[Tensor, Tensor]:
    """The (up to) `number` images of the lowest PSNR, the worst first, and their reconstructions: `(N, 3, H, W)` in [0, 1]."""
    worst = measured.reconstruction.values["psnr"].argsort()[:number]
    records = measured.source.dataset().select([measured.indices[row] for row in worst.tolist()])
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    images = torch.cat([batch["pixel_values"] for batch in iter_batches(records, processor, BATCH_SIZE)])
    with torch.inference_mode():
        return images, model.decode(measured.codes[worst].to(model.device)).float().cpu()
