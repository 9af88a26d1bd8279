"""Worth of a shared generator to a site with few images: classifiers trained on n real images with and without generated ones.

Source: train-on-synthetic-test-on-real, Esteban et al., "Real-valued (Medical) Time Series Generation with Recurrent
Conditional GANs", arXiv 1706.02633, section 4.1. Differs: generated images come beside real ones, in several ratios and for n
that grows; every classifier sees each real image equally often; there are baselines without generated images; and gains are
differences of AUC, paired by seed and test image, of a classifier that tells one class, such as melanoma, from all others.

A seed draws the n real images (stratified by diagnosis), the generated ones, the first weights and the order. No choice depends
on test images. Pool k, `synthetic-seedK/`, has an image for the diagnosis of each real training image; all cells draw from the
same pools. See `ClassifierStudy` for the folder: a finished classifier is not trained again, whatever else is asked for later.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isic_vq.data.order import stratified_subset
from isic_vq.evaluation.gains import estimate, expected_half_width, holm
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.skin_tone import typology_angles
from isic_vq.evaluation.student import ClassifierStudy, LabelledImages, Student, training_operations
from isic_vq.generate import MANIFEST
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel

SIZES = ("50", "200", "1000", "all")
RATIOS = (1, 3, 10)
FEW = 100  # real images, up to which there are more seeds: which images they are decides most
MANY = 1000  # real images, above which there are fewer seeds and no ratio above 3
STUDENT = Student(
    image_size=48,
    model={"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"},
)
# How often each of 50 real images is shown; of n images sqrt(50 / n) times that, so that steps grow as sqrt(n).
PASSES = 30
LONGER = 4  # times the passes, of real images alone: as many steps as with generated images 3:1
REFERENCE = "flips"
ITA_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FAMILY = 0.05  # probability, over all comparisons of a report, of a gain or loss where there is none


@dataclass(frozen=True, eq=False)
class Arm:
    """A way to train with n real images.

    Attributes:
        added: kind of the images beside the real ones: "" (none), "same mix" or "rare alone" (generated), and, to see that the
            study finds what is there and nothing else, "held-out real images" and "noise".
        ratio: added images per real one of the same diagnoses.
        oversampled: repeat the images of the rare class until they are as many as the others.
        passes: factor of the passes.
        student: fields of `Student` that differ.
    """

    name: str
    added: str = ""
    ratio: int = 0
    oversampled: bool = False
    passes: int = 1
    student: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return self.name.replace(" ", "-").replace(":", "to")


BASELINES = (
    Arm(REFERENCE),
    Arm("no augmentation", student={"augment": False}),
    Arm("oversampling", oversampled=True),
    Arm("class weights", student={"class_weights": True}),
    Arm("longer", passes=LONGER),
)
GENERATED = ("same mix", "rare alone")
PLANTED = ("held-out real images", "noise")


def arms(number: int, of: int, ratios: Sequence[int], planted: bool) -> list[Arm]:
    """The arms for `number` real images of a site's `of`; held-out real images in the highest ratio that there are enough of."""
    allowed = [ratio for ratio in sorted(set(ratios)) if ratio > 0 and (ratio <= 3 or number <= MANY)]
    generated = [Arm(f"{kind} {ratio}:1", kind, ratio) for ratio in allowed for kind in GENERATED]
    left_over = [ratio for ratio in allowed if (ratio + 1) * number <= of]
    highest = max(left_over, default=0), min(max(allowed, default=0), 3)
    checks = [
        Arm(f"{kind} {ratio}:1", kind, ratio)
        for kind, ratio in zip(PLANTED, highest, strict=True)
        if planted and ratio
    ]
    return [*BASELINES, *generated, *checks]


def passes(number: int) -> float:
    """How often each of some real images is shown."""
    return PASSES * (50 / number) ** 0.5


def utility_report(
    model: str | None,
    train: str,
    tests: Mapping[str, str],
    work_dir: Path | None = None,
    *,
    seeds: int | None = None,
    sizes: Sequence[str] = SIZES,
    ratios: Sequence[int] = RATIOS,
    positive: str = "melanoma",
    planted: bool = False,
    smoke: bool = False,
    device: str | None = None,
) -> Report:
    """Open a checkpoint, train classifiers with and without its images, and test them on real ones.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        train: URI of the site's real images that classifiers may be trained on.
        tests: by name, URIs of other real images, which the model was not trained on either.
        work_dir: folder of generated images and finished classifiers, by which a killed call is resumed; by default in runs/.
        seeds: how often each classifier is trained, at least 2; by default 10 up to 100 real images, 5 up to 1,000 and
            3 above.
        sizes: how many real images, or "all"; by default 50, 200, 1000 and all.
        ratios: generated images per real one; by default 1, 3 and, up to 1,000 real images, 10.
        positive: the class that is told from all others, and is generated alone in some arms.
        planted: train on held-out real images and on noise in place of generated ones, too, to see that the study finds
            the one's worth and not the other's.
        smoke: 50 images of each set, ratio 1, two seeds: to see that it runs; marked so.
        device: as `load_model` takes it.

    Raises:
        ModelError, ValueError, DataError: as `load_model`, `ClassifierStudy` and `UtilityStudy`.
    """
    generator, limit = load_model(IsicVQModel, model, device), None
    if smoke:
        sizes, ratios, seeds, limit = ("all",), (1,), 2, 50
    folder = work_dir or Path("runs/utility-smoke" if smoke else "runs/utility")
    study = ClassifierStudy(
        generator, train, tests, folder, seeds=2 if seeds is None else seeds, student=STUDENT, limit=limit
    )
    utility = UtilityStudy(study, positive, sizes, ratios, seeds, planted)
    report = utility.report()
    report.model["smoke"] = smoke
    return report


class UtilityStudy:
    """All classifiers of a utility study, and what they show.

    Args:
        study: its images and its folder; how its student is trained, but for the number of steps.
        positive, sizes, ratios, seeds, planted: as `utility_report` takes them.

    Raises:
        ValueError: a size that is no number of the images, or too few images of the class to train on or to test.
    """

    def __init__(
        self,
        study: ClassifierStudy,
        positive: str,
        sizes: Sequence[str] = SIZES,
        ratios: Sequence[int] = RATIOS,
        seeds: int | None = None,
        planted: bool = False,
    ):
        self.study, self.positive, self.seeds = study, positive, seeds
        if positive not in study.classes:
            raise ValueError(f"positive is {positive!r}: expected one of {', '.join(study.classes)}")
        for split in study.on:
            positives = list(study.records[split]["diagnosis"]).count(positive)
            others = len(study.records[split]) - positives
            if min(positives, others) < 2:
                raise ValueError(
                    f"{split} has {positives} images of {positive} and {others} others: expected at least two of each; test on more"
                )
        self.diagnoses = np.array(study.records["train"]["diagnosis"])
        total = len(self.diagnoses)
        try:
            numbers = [total if size == "all" else int(size) for size in sizes]
        except ValueError as error:
            raise ValueError(f"sizes are {', '.join(sizes)}: expected numbers or 'all'") from error
        for number in numbers:
            if not 2 <= number <= total:
                raise ValueError(f"size {number}: expected 2 to {total}, the training images")
            drawn = self.diagnoses[stratified_subset(self.diagnoses, number, 0)]
            if len(set((drawn == positive).tolist())) < 2:
                raise ValueError(
                    f"{number} training images, drawn by diagnosis, are all {positive} or none is: take more"
                )
        self.cells = {number: arms(number, total, ratios, planted) for number in dict.fromkeys(numbers)}
        self.is_positive = self.diagnoses == positive
        self.pixels = cache(lambda: study.read(study.records["train"]).pixels)
        self.pool = cache(lambda k: study.read(study.generated(f"synthetic-seed{k}", "train", k)).pixels)

    def seeds_of(self, number: int) -> range:
        """The seeds of so many real images."""
        return range(self.seeds or (10 if number <= FEW else 5 if number <= MANY else 3))

    def images(self, number: int, arm: Arm, seed: int) -> LabelledImages:
        """What a classifier is trained on."""
        rows = stratified_subset(self.diagnoses, number, seed)
        rare = rows[self.is_positive[rows]]
        if arm.oversampled:
            repeats = max(1, round((number - len(rare)) / len(rare)))
            rows = np.concatenate([rows, np.tile(rare, repeats - 1)])
        images = self._labelled(self.pixels()[rows], rows)
        if not arm.added:
            return images
        return images + self._added(arm, rare if arm.added == "rare alone" else rows, rows, seed)

    def _labelled(self, pixels: Tensor, rows: NDArray[np.int64]) -> LabelledImages:
        return LabelledImages(pixels, torch.from_numpy(self.is_positive[rows]).long())

    def _added(
        self, arm: Arm, companions: NDArray[np.int64], rows: NDArray[np.int64], seed: int
    ) -> LabelledImages:
        """`ratio` images for each of some real ones."""
        wanted = arm.ratio * len(companions)
        if arm.added == "held-out real images":
            others = np.setdiff1d(np.arange(len(self.diagnoses)), rows)
            chosen = others[stratified_subset(self.diagnoses[others], wanted, seed)]
            return self._labelled(self.pixels()[chosen], chosen)
        if arm.added == "noise":
            generator = torch.Generator().manual_seed(seed)
            shape = (wanted, *self.pixels().shape[1:])
            noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            return self._labelled(noise, np.tile(companions, arm.ratio))
        parts = [
            self._labelled(self.pool(k)[chosen], chosen)
            for k, chosen in drawn_from_pools(self.diagnoses, companions, arm.ratio, seed).items()
        ]
        return sum(parts[1:], parts[0])

    def scores(self, number: int, arm: Arm, tested: Tensor) -> list[Tensor]:
        """Of each seed, log-odds of the class for test images `(N, 3, H, W)` uint8, `(N,)`; what is missing is trained."""
        found = []
        student = replace(self.study.student, passes=arm.passes * passes(number), **arm.student)
        for seed in self.seeds_of(number):
            logits = self.study.logits(
                f"n{number}-{arm.slug}",
                seed,
                partial(self.images, number, arm, seed),
                ("other", self.positive),
                tested,
                student,
            )
            found.append(logits[:, 1] - logits[:, 0])
        return found

    def report(self) -> Report:
        """Train what is missing, the fewest real images first, and compare.

        Returns:
            For each test, number of real images (label `real`) and arm `auc` and, but for the reference, `auc_gain`. Tables:
            `comparisons`, of each gain with p-value, corrected p-value, every seed's value and what may be said; `half_widths`,
            that were expected and found; `ita`, quantiles of the typology angle of real and generated images; `cost`.
        """
        parts = {split: self.study.read(self.study.records[split]) for split in self.study.on}
        tested = torch.cat([images.pixels for images in parts.values()])
        scores = {
            number: {arm: self.scores(number, arm, tested) for arm in cell}
            for number, cell in sorted(self.cells.items())
        }
        metrics: list[Metric] = []
        comparisons: list[dict[str, Any]] = []
        half_widths, first = {}, 0
        index = self.study.classes.index(self.positive)
        for split, images in parts.items():
            rows = slice(first, first + len(images.labels))
            first, positive = rows.stop, images.labels == index
            for number, cell in scores.items():
                mine = {arm: [each[rows] for each in found] for arm, found in cell.items()}
                metrics += self._compare(split, number, mine, positive, comparisons)
            half_widths[split] = self._half_widths(split, positive, metrics)
        correct(comparisons)
        report = self.study.report(metrics)
        seeds = {str(number): len(self.seeds_of(number)) for number in scores}
        report.model |= {
            "positive": self.positive,
            "passes_of_50": PASSES,
            "seeds": seeds,
            **self._generator(),
        }
        report.tables = {
            "comparisons": comparisons,
            "half_widths": half_widths,
            "ita": self._ita(),
            "cost": self._cost(),
        }
        return report

    def _compare(
        self,
        split: str,
        number: int,
        scores: Mapping[Arm, Sequence[Tensor]],
        positive: Tensor,
        comparisons: list[dict[str, Any]],
    ) -> list[Metric]:
        """The lines of one test and number of real images; adds to the comparisons."""
        on, metrics = self.study.on[split], []
        reference = scores[BASELINES[0]]
        for arm, found in scores.items():
            labels = {"real": str(number), "arm": arm.name}
            shown = [("auc", estimate(found, positive))]
            if arm != BASELINES[0]:
                gain = estimate(found, positive, reference)
                shown.append(("auc_gain", gain))
                comparisons.append(
                    {
                        "test": split,
                        "real": number,
                        **{key: getattr(arm, key) for key in ("name", "added", "ratio")},
                        **asdict(gain),
                        "interval": list(gain.interval),
                    }
                )
            metrics += [
                on.metric(name, value.value, "1", len(positive), 0, value.interval, **labels)
                for name, value in shown
            ]
        return metrics

    def _half_widths(self, split: str, positive: Tensor, metrics: Sequence[Metric]) -> dict[str, float]:
        """Of the intervals of a test: of one AUC of .8, before anything was measured, and of the gains, their median."""
        gains = [
            (metric.interval[1] - metric.interval[0]) / 2
            for metric in metrics
            if metric.split == split and metric.name == "auc_gain" and metric.interval
        ]
        counts = int(positive.sum()), int((~positive).sum())
        return {
            "positive": counts[0],
            "other": counts[1],
            "expected": expected_half_width(0.8, *counts),
            "median_of_gains": float(np.median(gains)),
        }

    def _generator(self) -> dict[str, Any]:
        """Which weights made the pools."""
        manifest = json.loads(
            (self.study.work_dir / "synthetic-seed0" / MANIFEST).read_text(encoding="utf-8")
        )
        return {"weights": manifest["weights"]}

    def _ita(self) -> dict[str, dict[str, Any]]:
        """Quantiles of the typology angle of the site's images and of the first pool's, which have the same diagnoses."""
        table = {}
        for name, pixels in (("real", self.pixels()), ("generated", self.pool(0))):
            angles = torch.cat([typology_angles(batch.float() / 255) for batch in pixels.split(256)])
            kept = angles[~angles.isnan()].numpy()
            table[name] = {
                "n": len(kept),
                "without_skin": len(angles) - len(kept),
                **{f"{quantile:.0%}": float(np.quantile(kept, quantile)) for quantile in ITA_QUANTILES},
            }
        return table

    def _cost(self) -> dict[str, float]:
        """What the report took: images of its pools, and of all classifiers, operations and processor seconds where each was trained."""
        images, seconds, number = 0.0, 0.0, 0
        for size, cell in self.cells.items():
            for arm in cell:
                for seed in self.seeds_of(size):
                    path = self.study.work_dir / f"n{size}-{arm.slug}-seed{seed}.json"
                    seconds += json.loads(path.read_text(encoding="utf-8"))["seconds"]
                    images += arm.passes * passes(size) * len(self.images(size, arm, seed).labels)
                    number += 1
        return {
            "classifiers": number,
            "images_generated": len(self.diagnoses) * self.pool.cache_info().currsize,
            "images_shown": round(images),
            "operations": images * training_operations(self.study.student, num_classes=2),
            "seconds": seconds,
        }


def drawn_from_pools(
    diagnoses: NDArray[Any], companions: NDArray[np.int64], ratio: int, seed: int
) -> dict[int, NDArray[np.int64]]:
    """Draw `ratio` generated images of the diagnosis of each of some real ones, each at most once.

    Image i of each pool is of diagnosis i. As few pools are drawn from as have enough images, so that what is drawn does not
    depend on how many there are.

    Returns:
        Rows by pool.
    """
    generator = np.random.default_rng(seed)
    names, counts = np.unique(diagnoses[companions], return_counts=True)
    rows = {name: np.flatnonzero(diagnoses == name) for name in names}
    num_pools = max(
        -(-ratio * int(count) // len(rows[name])) for name, count in zip(names, counts, strict=True)
    )
    drawn: dict[int, list[NDArray[np.int64]]] = {k: [] for k in range(num_pools)}
    for name, count in zip(names, counts, strict=True):
        places = generator.permutation(num_pools * len(rows[name]))[: ratio * count]
        for k in drawn:
            drawn[k].append(rows[name][places[places // len(rows[name]) == k] % len(rows[name])])
    return {k: np.concatenate(parts) for k, parts in drawn.items()}


def correct(comparisons: list[dict[str, Any]]) -> None:
    """Add to each comparison `corrected`, its p-value corrected for their number, and `verdict`.

    Planted arms are a family of their own. The verdict is "gain" or "loss" where the corrected p-value is below `FAMILY`
    and every seed's difference has that sign, else "not significant".
    """
    for family in (False, True):
        mine = [row for row in comparisons if (row["added"] in PLANTED) == family]
        for row, corrected in zip(mine, holm([row["p_value"] for row in mine]), strict=True):
            agree = set(np.sign(row["seeds"]).astype(int).tolist())
            significant = corrected < FAMILY and len(agree) == 1
            row |= {
                "corrected": corrected,
                "verdict": {1: "gain", -1: "loss"}[agree.pop()] if significant else "not significant",
            }
