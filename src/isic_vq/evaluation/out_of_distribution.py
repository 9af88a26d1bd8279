"""How well a model's scores tell its kind of images from others: the area under the ROC curve for each other kind.

Below 0.5 a score ranks the unusual images as *more* usual. Scores are those of `scores`, unconditional; unusual images are
corrupted ones, and images without skin. A corruption is a function of the pixels and of one random generator per image, so
that an image's result depends on the seed and its index alone, not on the batch; strengths are meant for 128 x 128 images.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from isic_vq.data.classes import AUTO, Classes
from isic_vq.data.sources import find_source
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measured_images import sampled_images
from isic_vq.evaluation.measures import auroc
from isic_vq.evaluation.report import Metric, Report, model_report
from isic_vq.evaluation.scores import SCORES, image_scores, read_reference
from isic_vq.hub.pretrained import load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.sampling import image_generators

PATCHES_PER_SIDE = 8


def gaussian_blur(pixel_values: Tensor, sigma: float) -> Tensor:
    """Convolve images `(B, 3, H, W)` with a Gaussian of `sigma` pixels, cut off at 3 sigma, borders mirrored."""
    reach = min(math.ceil(3 * sigma), min(pixel_values.shape[2:]) - 1)  # as far as a border can be mirrored
    offsets = torch.arange(-reach, reach + 1, dtype=pixel_values.dtype, device=pixel_values.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixel_values, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3)


def shuffle_patches(
    pixel_values: Tensor, generators: Sequence[torch.Generator], patches_per_side: int = PATCHES_PER_SIDE
) -> Tensor:
    """Cut each image `(B, 3, H, W)` into equal squares and put them back in a random order."""
    batch, _, height, width = pixel_values.shape
    if height % patches_per_side or width % patches_per_side:
        raise ValueError(
            f"images of {height} x {width} px have no {patches_per_side} patches per side: expected a multiple"
        )
    size = (height // patches_per_side, width // patches_per_side)
    patches = F.unfold(pixel_values, size, stride=size)  # (B, 3 * patch height * patch width, number)
    orders = torch.stack([torch.randperm(patches.shape[2], generator=g) for g in generators])
    index = orders.to(patches.device)[:, None, :].expand_as(patches)
    return F.fold(patches.gather(2, index), (height, width), size, stride=size)


def add_noise(pixel_values: Tensor, generators: Sequence[torch.Generator], std: float) -> Tensor:
    """Add Gaussian noise of standard deviation `std` to images `(B, 3, H, W)` in [0, 1], and clamp."""
    noise = torch.stack([torch.randn(pixel_values.shape[1:], generator=g) for g in generators])
    return (pixel_values + std * noise.to(pixel_values)).clamp(0, 1)


@dataclass(frozen=True)
class Corruption:
    """A way to corrupt images."""

    description: str
    # From images `(B, 3, H, W)` in [0, 1] and B generators to images of the same shape and range.
    apply: Callable[[Tensor, Sequence[torch.Generator]], Tensor]


CORRUPTIONS = {
    "blur": Corruption("Gaussian blur, sigma 2 px", lambda images, _: gaussian_blur(images, sigma=2.0)),
    "inverted": Corruption("1 - pixel value", lambda images, _: 1 - images),
    "shuffled": Corruption("8 x 8 patches in random order", shuffle_patches),
    "noise": Corruption(
        "Gaussian noise, standard deviation 0.1",
        lambda images, generators: add_noise(images, generators, std=0.1),
    ),
}


def corrupt(name: str, pixel_values: Tensor, seed: int, first_index: int = 0) -> Tensor:
    """Corrupt images `(B, 3, H, W)` in [0, 1] by one of `CORRUPTIONS`: image i from its pixels and (seed, first_index + i)."""
    generators = image_generators(seed, len(pixel_values), first_index)
    return CORRUPTIONS[name].apply(pixel_values, generators)


USUAL, NON_SKIN = "clean", "non_skin"
TILE_SIDE = 128
NUM_BINS = 30


def photograph_tiles() -> list[np.ndarray]:
    """Cut scikit-learn's two sample photographs, a temple and a flower, into 30 RGB tiles (128, 128, 3), uint8.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ImportError(
            "the photographs that show no skin come with scikit-learn: pip install scikit-learn, or name other images"
        ) from error
    return [
        photograph[top : top + TILE_SIDE, left : left + TILE_SIDE]
        for photograph in load_sample_images().images
        for top in range(0, photograph.shape[0] - TILE_SIDE + 1, TILE_SIDE)
        for left in range(0, photograph.shape[1] - TILE_SIDE + 1, TILE_SIDE)
    ]


def evaluate_out_of_distribution(
    model: str | None,
    uri: str,
    train_codes: Path,
    split: str = "validation",
    non_skin: str | None = None,
    limit: int = 300,
    seed: int = 0,
    max_corrupt_share: float = 0.01,
    progress: bool = False,
    device: str | None = None,
) -> Report:
    """Score images, corrupted copies of them and images without skin, and tell each kind from the first.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        uri: the usual images; not those the model was trained on.
        train_codes: code cache of the training images.
        split: what the report calls the usual images.
        non_skin: URI of images without skin; by default photographs of scikit-learn, see `photograph_tiles`.
        limit: at most this many images of a source, a seeded subset; of one that is streamed, up to
            `isic_vq.data.streaming.MAX_SAMPLE`.
        seed: of the subsets and of the corruptions.
        max_corrupt_share: share of unreadable images past which to fail.
        progress: show a bar.
        device: as `load_model` takes it.

    Returns:
        A report with `auroc` for each score and kind of unusual images, `bits_per_code` for each kind (labels `score` and
        `images`), and tables with the scores' histograms.

    Raises:
        ImportError: scikit-learn is needed and not installed.
        ModelError, DataError: as their docstrings say.
    """
    loaded = load_model(IsicVQModel, model, device)
    report = model_report(Path(resolve(model)).name, loaded)
    processor = IsicVQImageProcessor(size=loaded.config.vqvae_config.image_size)
    if non_skin is None:
        tiles, non_skin_name = photograph_tiles(), "tiles of scikit-learn's sample photographs"
        others = [processor(tiles, return_tensors="pt")["pixel_values"]]
    else:
        other_source = find_source(non_skin, Classes.parse(AUTO))
        non_skin_name = other_source.name
        others = list(sampled_images(other_source, processor, limit, seed, max_corrupt_share))
    source = find_source(uri, Classes.parse(AUTO))
    reference = read_reference(train_codes, loaded, seed=seed)
    copies = _corrupted_copies(sampled_images(source, processor, limit, seed, max_corrupt_share), seed)
    total = min(limit, source.describe().num_images) * (1 + len(CORRUPTIONS)) + sum(map(len, others))
    parts: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in (USUAL, *CORRUPTIONS, NON_SKIN)}
    with tqdm(total=total, unit="image", desc="scoring", disable=not progress) as bar:
        for kind, pixel_values in itertools.chain(copies, zip(itertools.repeat(NON_SKIN), others)):
            output = loaded.score(pixel_values)
            parts[kind].append(image_scores(output["bits"], output["codes"], reference))
            bar.update(len(pixel_values))
    scores = {
        kind: {name: torch.cat([part[name] for part in batches]) for name in SCORES}
        for kind, batches in parts.items()
    }
    bits, number, unit = reference.bits_per_code, reference.num_images, "bits per code"
    training = MeasuredOn("train", reference.source)
    report.metrics += [
        training.metric("bits_per_code", bits, unit, number, seed, images="training"),
        *score_metrics(scores, MeasuredOn(split, source.name), seed),
    ]
    corrupted = {name: corruption.description for name, corruption in CORRUPTIONS.items()}
    report.tables["unusual_images"] = {**corrupted, NON_SKIN: non_skin_name}
    report.tables["histograms"] = score_histograms(scores)
    return report


def score_metrics(scores: dict[str, dict[str, Tensor]], on: MeasuredOn, seed: int) -> list[Metric]:
    """The report's lines for scores `(N,)` by kind of image and name: means of the bits, then every AUROC.

    An AUROC's n counts the usual and the unusual images.
    """
    lines = []
    for kind, by_name in scores.items():
        bits = by_name["bits_per_code"]
        mean = bits.mean().item()
        lines.append(on.metric("bits_per_code", mean, "bits per code", len(bits), seed, images=kind))
    for name in SCORES:
        usual = scores[USUAL][name]
        for kind in [kind for kind in scores if kind != USUAL]:
            unusual = scores[kind][name]
            number = len(usual) + len(unusual)
            area = auroc(usual, unusual)
            lines.append(on.metric("auroc", area, "AUROC", number, seed, score=name, images=kind))
    return lines


def score_histograms(scores: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """For every score `(N,)` `edges`, NUM_BINS + 1 numbers in bits per code, and `counts`, NUM_BINS integers by kind."""
    tables = {}
    for name in SCORES:
        by_kind = {kind: by_name[name].numpy() for kind, by_name in scores.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(by_kind.values())), bins=NUM_BINS)
        counts = {kind: np.histogram(values, edges)[0].tolist() for kind, values in by_kind.items()}
        tables[name] = {"edges": edges.tolist(), "counts": counts}
    return tables


def _corrupted_copies(batches: Iterator[Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    first = 0
    for pixel_values in batches:
        yield USUAL, pixel_values
        for name in CORRUPTIONS:
            yield name, corrupt(name, pixel_values, seed, first)
        first += len(pixel_values)
