"""Evaluate a checkpoint on data sets: reconstruction, codebook use, likelihood, generated images and cost."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from isic_vq.data.classes import UNKNOWN, Classes, counted
from isic_vq.data.code_cache import CodeCache, check_tokenizer, read_code_cache
from isic_vq.data.loading import iter_batches
from isic_vq.data.order import seeded_subset
from isic_vq.data.sources import Source, find_source
from isic_vq.evaluation.bits_per_code import (
    bits_metrics,
    bits_per_code,
    class_bits,
    conditioning_metrics,
    likelihood_metrics,
    unigram_bits,
)
from isic_vq.evaluation.codebook import codebook_metrics, counts_by_diagnosis
from isic_vq.evaluation.cost import cost_metrics
from isic_vq.evaluation.generation import Yardstick, evaluate_generation
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measured_images import (
    BATCH_SIZE,
    MeasuredImages,
    class_ids,
    group_metrics,
    measure_images,
    sampled_images,
)
from isic_vq.evaluation.measures import UNITS, PerceptualDistance, code_counts
from isic_vq.evaluation.reconstruction import evaluate_reconstruction, psnr_by_batch_statistics
from isic_vq.evaluation.report import Metric, Report, model_report
from isic_vq.hub.pretrained import load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

logger = logging.getLogger(__name__)

MAX_CLASSES = 100  # under each of which every image is scored
TRAIN_SAMPLE = 1000  # training images, a seeded subset, whose likelihood stands beside the others'
GROUPED = ("psnr", "ssim")  # and bits per code: reported of every diagnosis, source, sex and site


@dataclass
class Evaluation:
    """A report on a model, and the images of every data set, by split."""

    model: IsicVQModel
    report: Report
    measured: dict[str, MeasuredImages]


class Steps:
    """Shows the steps of an evaluation as bars, or without `progress` logs them."""

    def __init__(self, number: int, progress: bool):
        self.number, self.progress, self.done = number, progress, 0

    def begin(self, what: str, total: int | None = None, unit: str = "image") -> tqdm:
        self.done += 1
        name = f"{self.done}/{self.number} {what}"
        if not self.progress:
            logger.info("%s%s", name, "" if total is None else f" ({total})")
        form = None if total else "{desc} ({elapsed})"
        return tqdm(total=total, unit=unit, desc=name, disable=not self.progress, bar_format=form)


def evaluate_checkpoint(
    model: str | None,
    data: Sequence[tuple[str, str]],
    train_codes: Path | None = None,
    train_data: str | None = None,
    features: Sequence[str] = (),
    floor_data: str | None = None,
    lpips: bool = False,
    max_corrupt_share: float = 0.01,
    seed: int = 0,
    progress: bool = False,
    device: str | None = None,
) -> Evaluation:
    """Measure a whole model on every image of some data sets.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        data: at least one split (what the report calls it, no two alike) and URI of images.
        train_codes: code cache of the training images; adds the unigram likelihood to the report, and the likelihood of up
            to 1000 training images in their first view.
        train_data: URI of the training images; adds the reconstruction of up to 1000 of them, and that of the first data set
            with BatchNorm as in training, where the tokenizer has BatchNorm.
        features: folders or Hub ids of image models; compares generated images with the first data set, see
            `evaluate_generation`.
        floor_data: URI of other real images for that comparison, such as the training images.
        lpips: measure LPIPS, too, see `PerceptualDistance`; needs the extra lpips.
        max_corrupt_share: share of unreadable images past which to fail.
        seed: of subsets, resampling and generated images.
        progress: show what is done and a bar for each step, otherwise log the steps.
        device: as `load_model` takes it.

    Raises:
        ValueError: there are no data sets, or two of one split; features without `floor_data` or the reverse; as
            `evaluate_generation` and `PerceptualDistance`.
        ModelError, DataError: as their docstrings say.
    """
    splits = [split for split, _ in data]
    _check_asked(splits, features, floor_data)
    loaded = load_model(IsicVQModel, model, device).eval()
    names = list(loaded.config.class_names.values())
    yardsticks = [Yardstick.from_pretrained(name, names) for name in features]
    perceptual = PerceptualDistance(loaded.device) if lpips else None
    cache = None
    if train_codes is not None:
        cache = read_code_cache(train_codes)
        check_tokenizer(cache, loaded.vqvae, train_codes.name)
    report = model_report(Path(resolve(model)).name, loaded)
    counts = None if cache is None else cache.counts()
    steps = Steps(1 + 2 * len(data) + sum(x is not None for x in (cache, train_data, floor_data)), progress)
    if cache is not None:
        with steps.begin("likelihood of training images"):
            report.metrics += train_metrics(loaded, cache, seed)
    evaluation = Evaluation(loaded, report, {})
    classes = Classes.of_model(names)
    for split, uri in data:
        source = find_source(uri, classes)
        number = len(source.dataset()) if source.has_random_access else None
        with steps.begin(f"{split}: encode and decode", number) as bar:
            measured = measure_images(loaded, source, max_corrupt_share, perceptual, bar.update)
        evaluation.measured[split] = measured
        with steps.begin(f"{split}: likelihood under every class", len(names), "class") as bar:
            add_data_set(evaluation, split, measured, counts, seed, bar.update)
    if train_data is not None:
        first = evaluation.measured[splits[0]]
        with steps.begin("training images: encode and decode"):
            report.metrics += gap_metrics(
                loaded, find_source(train_data, classes), first, splits[0], seed, max_corrupt_share
            )
    if floor_data is not None:
        reference, others = evaluation.measured[splits[0]].source, find_source(floor_data, classes)
        steps.begin("generate and compare images").close()
        metrics, report.tables["generation"] = evaluate_generation(
            loaded, yardsticks, reference, others, splits[0], seed=seed,
            max_corrupt_share=max_corrupt_share, progress=progress,
        )  # fmt: skip
        report.metrics += metrics
    dataset = evaluation.measured[splits[0]].info.name
    with steps.begin("seconds and bytes"):
        report.metrics += cost_metrics(loaded, report.value("bits_per_code", splits[0], dataset), seed)
    return evaluation


def _check_asked(splits: Sequence[str], features: Sequence[str], floor_data: str | None) -> None:
    if not splits or len(set(splits)) < len(splits):
        raise ValueError(f"data sets are called {splits}: expected at least one, and each name once")
    if bool(features) != (floor_data is not None):
        raise ValueError(
            "generated images are compared by image models and beside other real images: give both, --features and "
            "--floor-data, or neither"
        )


def add_data_set(
    evaluation: Evaluation,
    split: str,
    measured: MeasuredImages,
    train_counts: Tensor | None,
    seed: int,
    on_class: Callable[[], object] | None = None,
) -> None:
    """Add a data set's lines and tables to the report; `on_class` is called after each class of the likelihood."""
    model, report, name = evaluation.model, evaluation.report, measured.info.name
    on = MeasuredOn(split, name)
    by_class = (
        class_bits(model, measured.codes, on_class)
        if 0 < len(model.config.class_names) <= MAX_CLASSES
        else None
    )
    bits = {"bits_per_code_unconditional": bits_per_code(model, measured.codes, None)}
    bits["bits_per_code"] = bits["bits_per_code_unconditional"].clone()
    if by_class is not None:  # an image without a diagnosis of the model's is scored without one
        known = measured.labels < by_class.shape[1]
        bits["bits_per_code"][known] = by_class[known].gather(1, measured.labels[known, None])[:, 0]
    elif model.config.class_names:
        logger.warning(
            "what the class saves is not measured: the model has %d classes, more than %d",
            len(model.config.class_names), MAX_CLASSES,
        )  # fmt: skip
        bits["bits_per_code"] = bits_per_code(model, measured.codes, measured.labels)
    others = Counter(str(row["diagnosis"]) for row in measured.rows)
    for known_name in (*model.config.class_names.values(), UNKNOWN):
        del others[known_name]
    if others and model.config.class_names:
        logger.warning(
            "%s: measured without a class, because the model has none of these: %s", name, counted(others)
        )
    if train_counts is not None:
        bits["bits_per_code_unigram"] = unigram_bits(train_counts, measured.codes).flatten(1).mean(1)
    counts = code_counts(measured.codes, model.config.vqvae_config.num_codes)
    values = measured.reconstruction.values
    report.metrics += [
        *(on.mean(key, values[key], unit) for key, unit in UNITS.items() if key in values),
        *codebook_metrics(counts, on, seed),
        *bits_metrics(model, bits, on),
    ]
    for kind, appearance in measured.appearance.items():
        report.metrics += appearance.metrics(on, seed, images=kind)
    if by_class is not None:
        unconditional, num_positions = bits["bits_per_code_unconditional"], measured.codes[0].numel()
        report.metrics += conditioning_metrics(
            by_class, unconditional, measured.labels, num_positions, on, seed
        )
    grouped = {key: values[key] for key in GROUPED} | {"bits_per_code": bits["bits_per_code"]}
    report.metrics += group_metrics(measured, grouped, on)
    report.tables[split] = {
        "data": dataclasses.asdict(measured.info),
        "codebook_counts": counts.sum(0).tolist(),
        "codebook_counts_by_diagnosis": counts_by_diagnosis(measured, counts),
    }


def gap_metrics(
    model: IsicVQModel,
    train: Source,
    measured: MeasuredImages,
    split: str,
    seed: int,
    max_corrupt_share: float,
) -> list[Metric]:
    """The report's lines for the reconstruction of training images, a seeded subset, and with BatchNorm as in training."""
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    images = sampled_images(train, processor, TRAIN_SAMPLE, seed, max_corrupt_share)
    training = evaluate_reconstruction(model.vqvae, images).values
    on = MeasuredOn("train", train.name)
    lines = [on.mean(name, training[name], UNITS[name], seed) for name in GROUPED]
    if model.config.vqvae_config.norm == "batch":
        batches = iter_batches(measured.source.records(), processor, BATCH_SIZE, None, max_corrupt_share)
        values = psnr_by_batch_statistics(model.vqvae, (batch["pixel_values"] for batch in batches))
        lines.append(MeasuredOn(split, measured.info.name).mean("psnr_batch_statistics", values, "dB"))
    return lines


def train_metrics(model: IsicVQModel, cache: CodeCache, seed: int) -> list[Metric]:
    """The report's lines for the likelihood of training images, a seeded subset."""
    rows = seeded_subset(len(cache.isic_ids), TRAIN_SAMPLE, seed)
    codes, labels = cache.first_views()[rows], class_ids(model, cache.diagnoses)[rows]
    on = MeasuredOn("train", cache.source.name)
    metrics = likelihood_metrics(model, cache.counts(), codes, labels, on)
    return [dataclasses.replace(metric, seed=seed) for metric in metrics if metric.interval]
