"""A model's pictures in folders: images that it generates, reconstructs, edits or scores, each with a grid of all.

Every PNG says in its text fields what made it, and every grid under its images.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from isic_vq.data.classes import AUTO, Classes
from isic_vq.data.uri import IMAGE_SUFFIXES
from isic_vq.figures.grid import captioned, image_grid, paired_grid
from isic_vq.figures.png import write_png
from isic_vq.figures.score_plots import Gallery
from isic_vq.figures.write import check_matplotlib, csv_bytes
from isic_vq.files import write_atomically
from isic_vq.models.checks import expect
from isic_vq.models.editing import IsicVQEditOutput, pixel_mask
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import BLOCK_SIZE, IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.pipeline_isic_vq import UnconditionalImageGenerationPipeline
from isic_vq.models.sampling import Sampling

# Generating and editing do without the extra `data`, so what imports it is imported where it is used.
if TYPE_CHECKING:
    from isic_vq.data.sources import Source
    from isic_vq.evaluation.reconstruction import Reconstruction

GRID = "grid.png"
MAX_PNGS = 4096  # images that are made at once, in about a gigabyte
MAX_SHOWN = 64  # reconstructions in a grid
NUM_SAMPLED = 32
SAMPLE_SIZE = 128
BLUE = (0.1, 0.4, 1.0)  # over what is redrawn


def image_name(index: int) -> str:
    """File name of the image with this index."""
    return f"image-{index:05d}.png"


def other_images(folder: Path, num_images: int) -> list[str]:
    """List the images in a folder that writing `num_images` images and a grid would not replace."""

    def is_replaced(name: str) -> bool:
        index = name.removeprefix("image-").removesuffix(".png")
        return name == GRID or (
            index.isdecimal() and int(index) < num_images and name == image_name(int(index))
        )

    names = (path.name for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(name for name in names if not is_replaced(name))


def write_generated(
    model: IsicVQModel,
    output: Path,
    num_images: int = 16,
    labels: Sequence[str] = (),
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = BLOCK_SIZE,
    backend: str = "auto",
    cluster: int | None = None,
    progress: bool = False,
) -> list[Path]:
    """Generate images and write each, and a grid of all, as PNGs.

    Args:
        model: a whole model.
        output: folder.
        num_images: how many, as PNGs at most 4096; see `generate_shards`.
        labels: diagnosis (name, alias or id); several are one per image; without any, images have no class.
        sampling: how codes are drawn; by default as the prior's `config.sampling` says.
        seed: image i depends on (seed, i) alone.
        batch_size: images computed at once, 16 by default; another number may round an image differently.
        backend: one of eager, compiled (needs numba), cuda_graph, or auto: the fastest of those tested on such a device.
        cluster: of a prior with clusters, that of all images; drawn for each by default.
        progress: show a progress bar.

    Returns:
        The files, the grid last.

    Raises:
        ValueError: an argument outside its range, or an unknown label.
    """
    allowed = f"at most {MAX_PNGS} PNGs; write shards (--shards parquet)"
    expect(num_images <= MAX_PNGS, "num_images", num_images, allowed)
    sampling = sampling or model.default_sampling
    result = UnconditionalImageGenerationPipeline(model)(
        labels[0] if len(labels) == 1 else list(labels) or None,
        num_images=num_images, seed=seed, batch_size=batch_size, sampling=sampling, backend=backend, cluster=cluster,
        output_type="np", return_codes=True, progress=progress,
    )  # fmt: skip
    titles = [_title(model, index) for index in result["labels"].tolist()]
    paths = [output / image_name(index) for index in range(num_images)]
    for index, (path, title) in enumerate(zip(paths, titles, strict=True)):
        texts = {"Title": title, "Source": _name(model)}
        comment = f"synthetic image, seed {seed}, index {index}"
        write_png(result["images"][index], path, {**texts, "Comment": comment})
    changes = [f"{name.replace('_', ' ')} {value}" for name, value in sampling.changes().items()]
    comment = ", ".join([f"synthetic images, seed {seed}", *changes])
    grid = image_grid(result["images"], labels=titles if labels else None)
    picture = captioned(grid, f"{_name(model)}: {num_images} {comment}")
    write_png(picture, output / GRID, {"Source": _name(model), "Comment": comment})
    return [*paths, output / GRID]


def write_reconstructions(
    tokenizer: VQVAEModel, data: str, output: Path, limit: int = 64, max_corrupt_share: float = 0.01
) -> "Reconstruction":
    """Send images through a tokenizer and back; write each reconstruction, and grids with and without originals.

    Args:
        tokenizer: put into eval mode and left there.
        data: URI of images, or an image file.
        output: folder.
        limit: at most this many images, the first ones.
        max_corrupt_share: share of unreadable images past which to fail.

    Returns:
        How well they came back.

    Raises:
        DataError: too many images are corrupt.
        ValueError: no image can be read.
    """
    from isic_vq.evaluation.reconstruction import evaluate_reconstruction

    expect(limit >= 1, "limit", limit, "at least 1")
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    batches, _ = read_images(data, processor, max_corrupt_share, stream=True)
    numbers = itertools.count()
    shown: list[tuple[Any, Any]] = []

    def first() -> Iterator[Tensor]:
        left = limit
        while left > 0 and (batch := next(batches, None)) is not None:
            yield batch[1][:left]
            left -= len(batch[1])
        if not shown:
            raise ValueError(f"{data} holds no readable image")

    def write(originals: Tensor, codes: Tensor, decoded: Tensor) -> None:
        before, after = (processor.postprocess(images, output_type="np") for images in (originals, decoded))
        for pair in zip(before, after, strict=True):
            index = next(numbers)
            write_png(pair[1], output / image_name(index), {"Comment": "VQ-VAE reconstruction"})
            if index < MAX_SHOWN:
                shown.append(pair)

    result = evaluate_reconstruction(tokenizer, first(), write)
    before, after = (np.stack(images) for images in zip(*shown, strict=True))
    measured = f"{_name(tokenizer)}, PSNR {result.psnr:.1f} dB over {result.num_images} images"
    for name, grid, comment in (
        ("reconstructions.png", image_grid(after), "VQ-VAE reconstructions"),
        (GRID, paired_grid(before, after)[0], "originals above reconstructions"),
    ):
        write_png(captioned(grid, f"{comment}: {measured}"), output / name, {"Comment": comment})
    return result


def write_edits(
    model: IsicVQModel,
    image: Path,
    output: Path,
    *,
    mask: Path | None = None,
    box: Sequence[int] | None = None,
    lower_half: bool = False,
    label: str | None = None,
    num_images: int = 4,
    particles: int = 64,
    seed: int = 0,
    dilation: int = 0,
    blend: str = "poisson",
    on_step: Callable[[], object] | None = None,
) -> IsicVQEditOutput:
    """Redraw a part of an image so that it fits the rest, in several variants; write each, and a grid, as PNGs.

    Args:
        model: a whole model.
        image: file.
        output: folder.
        mask: picture of the image's size; what is white is redrawn.
        box: left, top, right and bottom of what is redrawn, in the image's pixels.
        lower_half: redraw the lower half.
        label: diagnosis (name, alias or id) to draw it as.
        num_images: variants, at most 256.
        particles: candidates per variant, at most 4096; more fit the rest of the image better.
        seed: variant i depends on (seed, i) alone.
        dilation: codes by which the mask grows on all sides.
        blend: "poisson" (no edge shows), "paste" (patches as decoded) or "decode" (kept codes are decoded, too).
        on_step: called after each of `num_images` times the prior's steps.

    Raises:
        ValueError: not one of mask, box and lower_half is given, or it marks nothing; an argument outside its range.
    """
    expect(1 <= num_images <= 256, "num_images", num_images, "1 to 256 variants")
    expect(particles <= 4096, "particles", particles, "at most 4096")
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    marked = marked_pixels(processor, image, mask, box, lower_half)
    original = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    edited: Any = model.inpaint(
        original.expand(num_images, -1, -1, -1), marked, label,
        num_particles=particles, seed=seed, dilation=dilation, blend=blend, on_step=on_step,
    )  # fmt: skip
    blue = torch.tensor(BLUE, device=model.device)[:, None, None]
    redrawn = pixel_mask(model.vqvae.code_grids(edited.mask[:1])[-1], model.config.vqvae_config.image_size)
    shown = torch.where(redrawn, (original + blue) / 2, original)
    before = processor.postprocess(torch.cat([original, shown]), output_type="np")
    after = processor.postprocess(edited.pixel_values, output_type="np")
    title = _title(model, edited.labels[0].item())
    texts = {"Title": title, "Source": _name(model)}
    for index, pixels in enumerate(after):
        comment = f"edited image, seed {seed}, index {index}"
        write_png(pixels, output / image_name(index), {**texts, "Comment": comment})
    names = ["original", "redrawn part", *(f"{title} {index}" for index in range(num_images))]
    texts["Comment"] = f"an image and its edits, seed {seed}"
    grid = image_grid(np.concatenate([before, after]), labels=names)
    write_png(captioned(grid, f"{_name(model)}: {texts['Comment']}"), output / GRID, texts)
    return edited


def marked_pixels(
    processor: IsicVQImageProcessor,
    image: Path,
    mask: Path | None = None,
    box: Sequence[int] | None = None,
    lower_half: bool = False,
) -> Tensor:
    """The pixels `(H, W)` bool of the model's square that a mask, a box or the lower half marks; see `write_edits`."""
    if (mask is not None) + (box is not None) + lower_half != 1:
        raise ValueError("what to redraw: expected one of --mask, --box and --lower-half")
    if lower_half:
        side = processor.size["height"]
        return (torch.arange(side) >= side // 2)[:, None].expand(side, side)
    width, height = processor.load_image(image).size
    if mask is not None:
        picture = processor.load_image(mask)
        if picture.size != (width, height):
            raise ValueError(
                f"--mask {mask} is {picture.size[0]} x {picture.size[1]} pixels: expected the image's {width} x {height}"
            )
        marked = processor.to_mask(mask)
    else:
        left, top, right, bottom = box  # type: ignore[misc]  # it is what is given
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"--box is {left},{top},{right},{bottom}: expected 0 <= left < right <= {width} and 0 <= top < bottom <= "
                f"{height}"
            )
        picture = Image.new("L", (width, height))
        picture.paste(255, (left, top, right, bottom))
        marked = processor.to_mask(picture)
    if not marked.any():
        raise ValueError("nothing is marked in the centred square of the image, which is what the model sees")
    return torch.from_numpy(marked)


def write_scores(
    model: IsicVQModel,
    data: str,
    output: Path,
    *,
    label: str | None = None,
    marginalize: bool = False,
    limit: int = 16,
    train_codes: Path | None = None,
    max_corrupt_share: float = 0.01,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Measure how likely the prior finds images: scores.csv, and heat maps of where they surprise it.

    Args:
        model: a whole model.
        data: URI of images, or an image file.
        output: folder.
        label: diagnosis (name, alias or id) to score all images as.
        marginalize: score under all diagnoses together, weighed alike.
        limit: heat maps of the first so many images; 0 writes the table alone.
        train_codes: code cache of the training images, for two more scores.
        max_corrupt_share: share of unreadable images past which to fail.
        progress: show a progress bar.

    Returns:
        The table's rows.

    Raises:
        DataError: too many images are corrupt, or the cache is of another tokenizer.
        ValueError: an unknown label, or no image can be read.
    """
    from isic_vq.evaluation.scores import read_reference, score_images

    if limit:
        check_matplotlib()
    config = model.config.vqvae_config
    processor = IsicVQImageProcessor(size=config.image_size)
    class_id = None if label is None else int(model.label_ids(label, 1))
    way = "marginal" if marginalize else "unconditional"
    if class_id is not None:
        way = model.config.class_names[class_id]
    reference = read_reference(train_codes, model, class_id, marginalize) if train_codes else None
    batches, total = read_images(data, processor, max_corrupt_share)
    rows: list[dict[str, Any]] = []
    gallery = Gallery(config.num_codes, limit)
    with tqdm(total=total, unit="image", desc="scoring", disable=not progress) as bar:
        for image in score_images(model, batches, class_id, marginalize, reference):
            bits_per_pixel = image.scores["bits_per_code"] * config.num_positions / config.image_size**2
            rows.append({"name": image.name, "label": way, **image.scores, "bits_per_pixel": bits_per_pixel})
            pixels = processor.postprocess(image.pixel_values[None], output_type="np")[0]
            gallery.add(image.name, pixels, image.bits_map.numpy(), image.scores["bits_per_code"])
            bar.update()
    if not rows:
        raise ValueError(f"{data} holds no readable image")
    write_atomically(output / "scores.csv", csv_bytes({key: [row[key] for row in rows] for key in rows[0]}))
    gallery.write(output)
    return rows


def write_sample(source: "Source", num_images: int, path: Path, seed: int = 0) -> int:
    """Write a grid of some images of a source, of a stream the first ones; returns how many it shows.

    They are the source's own pixels, not generated ones. ValueError if none can be read.
    """
    from isic_vq.data.loading import iter_batches

    chosen = sorted(np.random.default_rng(seed).permutation(num_images)[:NUM_SAMPLED].tolist())
    records = (
        source.dataset().select(chosen) if source.has_random_access else source.stream().take(NUM_SAMPLED)
    )
    processor = IsicVQImageProcessor(size=SAMPLE_SIZE)
    batches = [
        batch["pixel_values"]
        for batch in iter_batches(records, processor, NUM_SAMPLED, max_corrupt_share=1.0)
    ]
    if not batches:
        raise ValueError(f"{source.name} holds no readable image among {len(chosen)}")
    pixels = np.concatenate([processor.postprocess(batch, output_type="np") for batch in batches])
    comment = f"{len(pixels)} images of {source.name}, seed {seed}: source images, not generated ones"
    grid = captioned(image_grid(pixels, columns=8), comment)
    write_png(grid, path, {"Title": "sample", "Comment": comment})
    return len(pixels)


def read_images(
    data: str, processor: IsicVQImageProcessor, max_corrupt_share: float, stream: bool = False
) -> tuple[Iterator[tuple[list[str], Tensor]], int | None]:
    """Names and pixel values `(B, 3, H, W)` of a source or image file, in batches, and their number; None if streamed."""
    if Path(data).is_file() and not data.endswith(".parquet"):
        return iter([([Path(data).name], processor(data, return_tensors="pt")["pixel_values"])]), 1
    from isic_vq.data.loading import iter_batches
    from isic_vq.data.sources import find_source

    source = find_source(data, Classes.parse(AUTO))
    if stream and source.is_listed_cheaply:
        source.describe()  # which tells what is left out
    records = source.stream() if stream else source.records()
    number = len(records) if not stream and source.has_random_access else None
    batches = iter_batches(records, processor, batch_size=32, max_corrupt_share=max_corrupt_share)
    return ((batch["isic_ids"], batch["pixel_values"]) for batch in batches), number


def _name(model: IsicVQModel | VQVAEModel) -> str:
    return Path(model.name_or_path).name


def _title(model: IsicVQModel, label: int) -> str:
    return model.config.class_names.get(label, "unconditional")
