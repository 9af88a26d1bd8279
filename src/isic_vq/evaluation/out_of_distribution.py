"""How well a model's scores tell its kind of images from others: the area under the ROC curve for each other kind.

Below 0.5 a score calls the unusual images *more* usual. See `scores` for the scores and `corruptions` for what is done to
the images; all are scored unconditionally.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from isic_vq.data.classes import AUTO, Classes
from isic_vq.data.sources import find_source
from isic_vq.evaluation.corruptions import CORRUPTIONS, corrupt
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measured_images import sampled_images
from isic_vq.evaluation.measures import auroc
from isic_vq.evaluation.report import Metric, Report, model_report
from isic_vq.evaluation.scores import SCORES, image_scores, read_reference
from isic_vq.hub.pretrained import load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

USUAL, NON_SKIN = "clean", "non_skin"
TILE_SIDE = 128
NUM_BINS = 30


def photograph_tiles() -> list[np.ndarray]:
    """Cut scikit-learn's two sample photographs, a temple and a flower, into tiles that do not overlap.

    Returns:
        30 RGB images, uint8 of shape (128, 128, 3).

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
    """Score images, spoiled copies of them and images that show no skin, and tell each kind from the first.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        uri: the usual images; not those the model was trained on.
        train_codes: code cache of the training images.
        split: what the report calls the usual images.
        non_skin: URI of images that show no skin; by default photographs of scikit-learn, see `photograph_tiles`.
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
    copies = _spoiled_copies(sampled_images(source, processor, limit, seed, max_corrupt_share), seed)
    total = min(limit, source.describe().num_images) * (1 + len(CORRUPTIONS)) + sum(map(len, others))
    parts: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in (USUAL, *CORRUPTIONS, NON_SKIN)}
    with tqdm(total=total, unit="image", desc="scoring", disable=not progress) as bar:
        for kind, pixel_values in itertools.chain(copies, zip(itertools.repeat(NON_SKIN), others)):
            output = loaded.score(pixel_values)
            parts[kind].append(image_scores(output["bits"], output["codes"], reference))
            bar.update(len(pixel_values))
    scores = {
        kind: {name: torch.cat([part[name] for part in found]) for name in SCORES}
        for kind, found in parts.items()
    }
    bits, number, unit = reference.bits_per_code, reference.num_images, "bits per code"
    training = MeasuredOn("train", reference.source)
    report.metrics += [
        training.metric("bits_per_code", bits, unit, number, seed, images="training"),
        *score_metrics(scores, MeasuredOn(split, source.name), seed),
    ]
    spoiled = {name: corruption.description for name, corruption in CORRUPTIONS.items()}
    report.tables["unusual_images"] = {**spoiled, NON_SKIN: non_skin_name}
    report.tables["histograms"] = score_histograms(scores)
    return report


def score_metrics(scores: dict[str, dict[str, Tensor]], on: MeasuredOn, seed: int) -> list[Metric]:
    """The report's lines for scores `(N,)` by kind of image and name: means of the bits, then every AUROC.

    An AUROC's n counts the usual and the unusual images.
    """
    usual = scores[USUAL]
    lines = []
    for kind, found in scores.items():
        bits = found["bits_per_code"]
        mean = bits.mean().item()
        lines.append(on.metric("bits_per_code", mean, "bits per code", len(bits), seed, images=kind))
    for name in SCORES:
        for kind in [kind for kind in scores if kind != USUAL]:
            area, number = auroc(usual[name], scores[kind][name]), len(usual[name]) + len(scores[kind][name])
            lines.append(on.metric("auroc", area, "AUROC", number, seed, score=name, images=kind))
    return lines


def score_histograms(scores: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Histograms of scores `(N,)` by kind of image and name, for a report's table.

    Returns:
        For every score `edges`, NUM_BINS + 1 numbers in bits per code, and `counts`, NUM_BINS integers by kind.
    """
    tables = {}
    for name in SCORES:
        every = torch.cat([of[name] for of in scores.values()]).numpy()
        edges = np.histogram_bin_edges(every, bins=NUM_BINS)
        counts = {kind: np.histogram(of[name].numpy(), edges)[0].tolist() for kind, of in scores.items()}
        tables[name] = {"edges": edges.tolist(), "counts": counts}
    return tables


def _spoiled_copies(batches: Iterator[Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each batch as it is, and once in every corruption."""
    first = 0
    for pixel_values in batches:
        yield USUAL, pixel_values
        for name in CORRUPTIONS:
            yield name, corrupt(name, pixel_values, seed, first)
        first += len(pixel_values)
