"""Sheets of pictures for close inspection: generated, interpolated, completed and edited images, and the atlas of codes.

All show model outputs only: images that are completed or edited were generated. The exception is `real_sheets`, with real images
beside generated ones: it may be published only where the real images may.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from isic_vq.data.classes import Classes
from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import Source, find_source
from isic_vq.evaluation.codebook import code_atlas
from isic_vq.figures.grid import captioned, image_grid, paired_grid
from isic_vq.figures.png import write_jpeg
from isic_vq.files import file_name
from isic_vq.models.checks import expect
from isic_vq.models.editing import pixel_mask
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modes import evaluating

NUM_UNCONDITIONAL = 64
NUM_PER_CLASS = 16
COLUMNS = 8
ROWS = 4  # of the panels: images that are mixed, completed and changed
ATLAS_COLUMNS = 32
GREY = 0.5


class Sheet(NamedTuple):
    """A picture, RGB, with its caption and the name of its file without suffix."""

    name: str
    caption: str
    picture: Image.Image


def model_sheets(model: IsicVQModel, seed: int = 0, particles: int = 64) -> Iterator[Sheet]:
    """Yield all sheets of a model's outputs as each is done; images are those of `IsicVQModel.generate` for the seed."""
    model.eval()
    for label in (None, *model.config.class_names.values()):
        name, number = (label, NUM_PER_CLASS) if label else ("unconditional", NUM_UNCONDITIONAL)
        caption = f"{name.replace('_', ' ')}: {number} images, seed {seed}, not selected"
        yield Sheet(name, caption, _grid(_images(model, number, label, seed)))
    yield interpolation_sheet(model, seed)
    yield completion_sheet(model, seed, particles)
    if model.config.class_names:
        yield counterfactual_sheet(model, seed, particles)
    yield atlas_sheet(model)


def write_sheets(
    model: IsicVQModel,
    output: Path,
    data: str | None = None,
    *,
    seed: int = 0,
    particles: int = 64,
    max_corrupt_share: float = 0.01,
    progress: bool = False,
) -> Iterator[tuple[Path, str]]:
    """Write `model_sheets`, or with data `real_sheets`, as JPEGs with their captions; yield each file and its caption.

    Args:
        model: as they take it.
        output: folder.
        data: URI of real images.
        seed: of everything that is drawn.
        particles: candidates per edit, at most 4096; more fit the rest of the image better.
        max_corrupt_share: share of unreadable images past which to fail.
        progress: show a progress bar.

    Raises:
        ValueError: too many particles.
        DataError: the images cannot be used.
    """
    expect(particles <= 4096, "particles", particles, "at most 4096")
    if data is None:
        sheets = model_sheets(model, seed, particles)
    else:
        source = find_source(data, Classes.of_model(model.config.class_names.values()))
        sheets = real_sheets(model, source, seed, max_corrupt_share)
    for sheet in tqdm(sheets, unit="sheet", disable=not progress):
        path = output / f"{file_name(sheet.name)}.jpg"
        write_jpeg(captioned(sheet.picture, sheet.caption), path, sheet.caption)
        yield path, sheet.caption


def interpolation_sheet(model: IsicVQModel, seed: int) -> Sheet:
    """Interpolation between generated images, a row each: decoded mixtures of their quantized vectors."""
    output: Any = model.generate(2 * ROWS, seed=seed)
    weights = torch.linspace(0, 1, COLUMNS, device=model.device)[:, None, None, None]
    rows = []
    with torch.inference_mode(), evaluating(model.vqvae):
        starts, ends = model.vqvae.quantizer.lookup(output.codes).split(ROWS)
        grids = model.vqvae.code_grids(output.codes)[-1]
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # The codes seed a refinement's noise.
            nearer = torch.where(weights[:, 0] < 0.5, grids[index], grids[ROWS + index])
            rows.append(model.vqvae.decoder(torch.lerp(start, end, weights), nearer).float())
    caption = f"from a generated image to another through mixtures of their quantized vectors, seed {seed}"
    return Sheet("interpolation", caption, _grid(torch.cat(rows)))


def completion_sheet(model: IsicVQModel, seed: int, particles: int) -> Sheet:
    """Generated images, the same without their right half, and completions."""
    size = model.config.vqvae_config.image_size
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[:, size // 2 :] = True
    variants = COLUMNS - 2
    rows = []
    for index, image in enumerate(_images(model, ROWS, None, seed)):
        edit: Any = model.inpaint(
            image.expand(variants, -1, -1, -1), mask, num_particles=particles, seed=seed,
            first_index=index * variants, blend="decode",
        )  # fmt: skip
        redrawn = pixel_mask(model.vqvae.code_grids(edit.mask[:1])[-1], size)
        rows += [image[None], torch.where(redrawn, GREY, image[None]), edit.pixel_values]
    caption = f"generated images, what is kept of them, and {variants} completions each, seed {seed}"
    return Sheet("completion", caption, _grid(torch.cat(rows)))


def counterfactual_sheet(model: IsicVQModel, seed: int, particles: int) -> Sheet:
    """Generated images of the first class, and their middle resampled under each diagnosis."""
    names = list(model.config.class_names.values())
    rows = []
    for index, image in enumerate(_images(model, ROWS, names[0], seed)):
        edit = model.counterfactual(
            image.expand(len(names), -1, -1, -1), names, num_particles=particles, seed=seed,
            first_index=index * len(names), blend="decode",
        )  # fmt: skip
        rows += [image[None], edit.pixel_values]
    labels = [f"generated {names[0]}", *names]
    caption = f"generated images, and their middle resampled under every diagnosis, seed {seed}"
    texts = [text.replace("_", " ") for text in labels] * ROWS
    return Sheet("counterfactual", caption, _grid(torch.cat(rows), len(labels), texts))


def atlas_sheet(model: IsicVQModel) -> Sheet:
    """The pixels that each code decodes to, the brightest first."""
    tiles = code_atlas(model.vqvae)
    order = tiles.mean(dim=(1, 2, 3)).argsort(descending=True)
    caption = "what each code draws among its like, the brightest first"
    return Sheet("atlas", caption, _grid(tiles[order], ATLAS_COLUMNS))


def real_sheets(
    model: IsicVQModel, source: Source, seed: int = 0, max_corrupt_share: float = 0.01
) -> Iterator[Sheet]:
    """Yield a sheet of real images above generated ones for each diagnosis that the source has images of.

    Publish it only where the real images may be.
    """
    model.eval()
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    diagnoses = np.asarray([row["diagnosis"] for row in source.metadata()])
    generator = np.random.default_rng(seed)
    for name in model.config.class_names.values():
        members = generator.permutation(np.flatnonzero(diagnoses == name))[:NUM_PER_CLASS]
        if len(members) == 0:
            continue
        records = source.dataset().select(sorted(members.tolist()))
        batches = iter_batches(records, processor, NUM_PER_CLASS, None, max_corrupt_share)
        real = torch.cat([batch["pixel_values"] for batch in batches])
        generated = _images(model, len(real), name, seed).cpu()
        picture, _ = paired_grid(_pixels(real), _pixels(generated), COLUMNS)
        yield Sheet(f"real-{name}", f"real images of {name.replace('_', ' ')} above generated ones", picture)


def _images(model: IsicVQModel, number: int, label: str | None, seed: int) -> Tensor:
    output: Any = model.generate(number, label, seed=seed)
    return output.pixel_values


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    return np.asarray(IsicVQImageProcessor().postprocess(images, output_type="np"))


def _grid(images: Tensor, columns: int = COLUMNS, labels: list[str] | None = None) -> Image.Image:
    return image_grid(_pixels(images), columns, labels=labels)
