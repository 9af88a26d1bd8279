"""Distances of generated images to real ones, beside those of real images and reconstructions at the same n.

Every distance has four lines, all to one reference set and all of sets with its number of images of each diagnosis:

* floor: other real images, which share none with the reference. No generator can be expected to come closer.
* reconstructions: these other images through the tokenizer: the best that a perfect prior would reach.
* disturbed: the same with some codes replaced by near ones (`CODE_NOISE`), as a prior mistakes them.
* samples: generated images, image i for the diagnosis of the reference's image i.

All images are rounded to 8 bits first, as files hold them. An interval covers the distance's expectation at this n, see
`isic_vq.evaluation.intervals`. A feature model that was trained on the other images but not on the reference adds a
difference of its own to the floor: take one that was trained on neither.

Where a yardstick is a classifier of diagnoses, `agreement` is the share of images that it gives the diagnosis that they were
generated for. Source: "conformity" in Shmelkov et al., "How good is my GAN?", arXiv 1807.09499 (GAN-test); differs: the
classifier is given, not trained on the same data here. It makes mistakes: read the agreement beside that of real images that
it has not seen, and of their reconstructions. A higher one of samples means that they are plainer than images.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from isic_vq.data.classes import NUM_LISTED
from isic_vq.data.loading import Batch, iter_batches
from isic_vq.data.sources import Source
from isic_vq.evaluation.appearance import Appearance
from isic_vq.evaluation.code_noise import disturb_codes
from isic_vq.evaluation.distances import (
    NUM_NEIGHBOURS,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from isic_vq.evaluation.features import DiagnosisClassifier, FeatureModel, names_diagnoses
from isic_vq.evaluation.intervals import MeasuredOn, subsample_intervals
from isic_vq.evaluation.measured_images import MIN_GROUP, class_ids
from isic_vq.evaluation.report import Metric
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.sampling import Sampling

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
# Of smaller codebooks all other codes are drawn from.
CODE_NOISE = {"image_share": 1.0, "code_share": 1.0, "num_nearest": 12}
MIN_IMAGES = 2 * (NUM_NEIGHBOURS + 1)  # halves have neighbours, too
RANGES = {  # an interval is symmetric, and ends where there are no values
    "frechet_distance": (0.0, np.inf),
    "kernel_distance": (-np.inf, np.inf),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
    "density": (0.0, np.inf),
    "coverage": (0.0, 1.0),
}


@dataclass(frozen=True)
class Yardstick:
    """An image model that images are compared by."""

    name: str  # of the folder or on the Hub; a label of every metric
    features: FeatureModel
    classifier: DiagnosisClassifier | None = None  # the same model with its head, if that names diagnoses

    @classmethod
    def from_pretrained(cls, model: str, classes: Collection[str] = ()) -> "Yardstick":
        """Open a folder or Hub id; a classifier may name own `classes` beside ISIC's."""
        is_classifier = names_diagnoses(model, classes)
        classifier = DiagnosisClassifier.from_pretrained(model, classes) if is_classifier else None
        name = Path(model).resolve().name if Path(model).is_dir() else model
        return cls(name, FeatureModel.from_pretrained(model), classifier)

    def to(self, device: torch.device) -> "Yardstick":
        """The same yardstick, its weights moved."""
        classifier = None if self.classifier is None else self.classifier.to(device)
        return Yardstick(self.name, self.features.to(device), classifier)


@dataclass
class EmbeddedImages:
    """A set of images of which only features and predicted diagnoses are kept, by yardstick."""

    yardsticks: Sequence[Yardstick]
    diagnoses: list[str] = field(default_factory=list)  # of each image, or what it was generated for
    features: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # batches `(B, D)`
    named: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # predicted diagnoses

    def add(self, images: Tensor, diagnoses: Sequence[str]) -> None:
        """Embed images `(B, 3, H, W)` in [0, 1], after rounding them to 8 bits."""
        self.diagnoses += diagnoses
        images = IsicVQImageProcessor().postprocess(images, output_type="pt")
        for yardstick in self.yardsticks:
            self.features[yardstick.name].append(yardstick.features(images).cpu())
            if yardstick.classifier is not None:
                self.named[yardstick.name] += yardstick.classifier.name(images)

    def joined(self, yardstick: str) -> NDArray[np.float32]:
        return torch.cat(self.features[yardstick]).numpy()


def set_distances(reference: NDArray[np.float32], images: NDArray[np.float32]) -> dict[str, float]:
    """All distances of features `(M, D)` to those of a reference `(N, D)`, by name."""
    return {
        "frechet_distance": frechet_distance(reference, images),
        "kernel_distance": kernel_distance(reference, images),
        **precision_recall_density_coverage(reference, images),
    }


def matched_rows(pool: Sequence[str], wanted: Sequence[str], seed: int) -> list[int]:
    """Draw rows of a pool, in ascending order and no row twice, so that each diagnosis occurs as often as in `wanted`."""
    generator = np.random.default_rng(seed)
    diagnoses, rows = np.asarray(pool), []
    for diagnosis, number in sorted(Counter(wanted).items()):
        members = np.flatnonzero(diagnoses == diagnosis)
        if len(members) < number:
            raise ValueError(
                f"the other real images have {len(members)} of {diagnosis} and the reference has {number}: give "
                "more others, or a smaller reference"
            )
        rows += generator.choice(members, number, replace=False).tolist()
    return sorted(rows)


def generated_images(
    model: IsicVQModel, labels: Tensor, seed: int, sampling: Sampling | None = None
) -> Iterator[Tensor]:
    """Yield images in blocks `(B, 3, H, W)` in [0, 1], image i of class id `labels[i]` and a function of (seed, i)."""
    output: Any
    for output in model.generate_blocks(len(labels), labels, seed=seed, sampling=sampling):
        yield output.pixel_values


@torch.no_grad()
def evaluate_generation(
    model: IsicVQModel,
    yardsticks: Sequence[Yardstick],
    reference: Source,
    others: Source,
    split: str,
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    max_corrupt_share: float = 0.01,
    progress: bool = False,
) -> tuple[list[Metric], dict[str, Any]]:
    """Measure floor, reconstructions and samples against a reference by each yardstick, and how samples look.

    The reference sets the number and the diagnoses of the generated and of the other images; a batch is in memory at a time.

    Args:
        model: a whole model; it is put into eval mode and left there.
        yardsticks: at least one; no two of one name.
        reference: real images that the model was not trained on.
        others: real images with random access that share none with the reference: the training images, or the other
            half of the data where there are none from the same source.
        split: what the report calls the reference.
        seed: of the samples, of the draw of others and of the intervals' halves.
        sampling: how codes are drawn; by default as the prior's `config.sampling` says.
        max_corrupt_share: share of unreadable images past which to fail. An unreadable one makes its set smaller.
        progress: show a bar.

    Returns:
        The report's lines (`frechet_distance`, `kernel_distance`, `precision`, `recall`, `density` and `coverage`, with
        the labels `images` and `yardstick`; `agreement`, where a yardstick is a classifier, of the reference, of its
        reconstructions and of samples; those of `Appearance` of samples) and a table of what was compared.

    Raises:
        ValueError: no yardsticks, or two of one name; fewer than `MIN_IMAGES` images; others that have too few of a
            diagnosis, or images of the reference.
        DataError: a source cannot be read, or others can only be streamed.
    """
    names = [yardstick.name for yardstick in yardsticks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the yardsticks are called {names}: expected at least one, and each name once")
    model.eval()
    yardsticks = [yardstick.to(model.device) for yardstick in yardsticks]
    sampling = sampling or model.default_sampling
    noise = CODE_NOISE | {
        "num_nearest": min(CODE_NOISE["num_nearest"], model.config.vqvae_config.num_codes - 1)
    }
    sets, appearance = _embedded_sets(
        model, yardsticks, reference, others, seed, sampling, noise, max_corrupt_share, progress
    )
    diagnoses = sets["reference"].diagnoses
    compared = {kind: sets[kind] for kind in ("floor", "reconstructions", "disturbed", "samples")}
    on = MeasuredOn(split, reference.name)
    metrics = appearance.metrics(on, seed, images="samples")
    for yardstick in yardsticks:
        metrics += distance_metrics(sets["reference"], compared, yardstick.name, on, seed)
        if yardstick.classifier is not None:
            named = {
                "reference": sets["reference"].named[yardstick.name],
                "reconstructions": sets["reference_reconstructions"].named[yardstick.name],
                "samples": sets["samples"].named[yardstick.name],
            }
            classes = model.config.class_names.values()
            known = shared_classes(yardstick.classifier, classes, yardstick.name)
            metrics += agreement_metrics(named, diagnoses, known, yardstick.name, on, seed)
    table = {
        "reference": reference.name,
        "others": others.name,
        "diagnoses": dict(sorted(Counter(diagnoses).items())),
        "neighbours": NUM_NEIGHBOURS,
        "sampling": asdict(sampling),
        "code_noise": noise,
        "yardsticks": names,
    }
    return metrics, table


def _embedded_sets(
    model: IsicVQModel,
    yardsticks: Sequence[Yardstick],
    reference: Source,
    others: Source,
    seed: int,
    sampling: Sampling,
    noise: dict[str, Any],
    max_corrupt_share: float,
    progress: bool,
) -> tuple[dict[str, EmbeddedImages], Appearance]:
    """Embed the reference, matched other images, the reconstructions of both, and samples; see the module."""
    pool = list(others.metadata())
    _check_disjoint(reference, pool)
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    kinds = ("reference", "reference_reconstructions", "floor", "reconstructions", "disturbed", "samples")
    sets = {kind: EmbeddedImages(yardsticks) for kind in kinds}
    appearance = Appearance(model.config.vqvae_config.downsampling)
    generator = torch.Generator().manual_seed(seed)

    def add_real(batches: Iterable[Batch], real: str, reconstructed: str, disturbed: str = "") -> None:
        for batch in tqdm(batches, unit="batch", desc=f"real images ({real})", disable=not progress):
            images = batch["pixel_values"].to(model.device)
            sets[real].add(images, batch["diagnoses"])
            codes = model.encode(images)
            sets[reconstructed].add(model.decode(codes), batch["diagnoses"])
            if disturbed:
                noisy = disturb_codes(codes, model.vqvae.quantizer.codebook, **noise, generator=generator)
                sets[disturbed].add(model.decode(noisy), batch["diagnoses"])

    batches = iter_batches(reference.records(), processor, BATCH_SIZE, None, max_corrupt_share)
    add_real(batches, "reference", "reference_reconstructions")
    diagnoses = sets["reference"].diagnoses
    if len(diagnoses) < MIN_IMAGES:
        raise ValueError(f"the reference has {len(diagnoses)} images: expected at least {MIN_IMAGES}")
    rows = matched_rows([row["diagnosis"] for row in pool], diagnoses, seed)
    batches = iter_batches(others.dataset().select(rows), processor, BATCH_SIZE, None, max_corrupt_share)
    add_real(batches, "floor", "reconstructions", "disturbed")
    labels = class_ids(model, diagnoses)
    with tqdm(total=len(labels), unit="image", desc="sampling", disable=not progress) as bar:
        for images in generated_images(model, labels, seed, sampling):
            start = len(sets["samples"].diagnoses)
            sets["samples"].add(images, diagnoses[start : start + len(images)])
            appearance.add(images)
            bar.update(len(images))
    return sets, appearance


def _check_disjoint(reference: Source, pool: Sequence[dict[str, Any]]) -> None:
    shared = {row["isic_id"] for row in reference.metadata()} & {row["isic_id"] for row in pool} - {None}
    if shared:
        raise ValueError(
            f"{len(shared)} of the other real images are in the reference, such as {min(shared)}: the floor would be "
            "of images against themselves; give others that share none with it"
        )


def distance_metrics(
    reference: EmbeddedImages,
    sets: Mapping[str, EmbeddedImages],
    yardstick: str,
    on: MeasuredOn,
    seed: int,
) -> list[Metric]:
    """The lines of distances to a reference, by one yardstick, of sets by their label `images`; ordered by distance."""
    features = reference.joined(yardstick)
    by_name: dict[str, list[Metric]] = defaultdict(list)
    for kind, embedded in sets.items():
        images, strata = embedded.joined(yardstick), (reference.diagnoses, embedded.diagnoses)
        intervals = subsample_intervals(set_distances, features, images, strata=strata, seed=seed)
        for name, value in set_distances(features, images).items():
            interval = np.clip(intervals[name], *RANGES[name]).tolist()
            labels = {"images": kind, "yardstick": yardstick}
            by_name[name].append(on.metric(name, value, "1", len(images), seed, interval, **labels))
    return [metric for lines in by_name.values() for metric in lines]


def shared_classes(classifier: DiagnosisClassifier, classes: Collection[str], yardstick: str) -> set[str]:
    """The classes of both a classifier and a model; a warning names those that one of them has alone."""
    theirs, ours = set(classifier.diagnoses), set(classes)
    if theirs != ours:
        alone = "; ".join(
            f"{owner} alone knows {', '.join(sorted(names)[:NUM_LISTED])}{' and others' * (len(names) > NUM_LISTED)}"
            for owner, names in (("the model", ours - theirs), (yardstick, theirs - ours))
            if names
        )
        number = len(theirs & ours)
        logger.warning(
            "agreement with %s is measured on the %d classes of both: %s", yardstick, number, alone
        )
    return theirs & ours


def agreement_metrics(
    named: Mapping[str, Sequence[str]],
    asked: Sequence[str],
    known: set[str],
    yardstick: str,
    on: MeasuredOn,
    seed: int,
) -> list[Metric]:
    """The share of images whose predicted diagnosis is right, over all and per diagnosis of at least `MIN_GROUP` images.

    `named` holds the classifier's diagnosis of each of N images, by name of their set; `asked` the diagnosis that each has, or
    was generated for, in every set. Images whose diagnosis is not `known`, to classifier and model, are left out.
    """
    rows = [row for row, diagnosis in enumerate(asked) if diagnosis in known]
    if not rows:
        return []
    groups: list[tuple[dict[str, str], list[int]]] = [({}, rows)]
    for diagnosis in sorted({asked[row] for row in rows}):
        members = [row for row in rows if asked[row] == diagnosis]
        if len(members) >= MIN_GROUP:
            groups.append(({"diagnosis": diagnosis}, members))
    return [
        on.share(
            "agreement",
            sum(predictions[row] == asked[row] for row in members),
            len(members),
            seed,
            images=name,
            yardstick=yardstick,
            **labels,
        )  # fmt: skip
        for name, predictions in named.items()
        for labels, members in groups
    ]
