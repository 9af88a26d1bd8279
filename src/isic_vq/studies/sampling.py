"""Which way of drawing codes brings generated images closest to real ones, and makes them look like their diagnosis?

For each setting of temperature, top-p and guidance as many images are generated as there are real ones, image i for
the diagnosis of real image i, all with one seed: settings share their uniforms, so that their differences are less
noisy than each number. Distances and agreement are those of `isic_vq.evaluation.generation`. A setting that is
chosen by such a table has seen these images: what it reaches must be told of others, or with that said.

In the work folder: a folder of shards for each setting, which is not made again.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from isic_vq.data.classes import Classes
from isic_vq.data.loading import Batch, iter_batches
from isic_vq.data.sources import find_source
from isic_vq.evaluation.agreement import agreement_metrics, shared_classes
from isic_vq.evaluation.generation import EmbeddedImages, Yardstick, distance_metrics
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Metric
from isic_vq.generation import generate_shards
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.sampling import Sampling

BATCH_SIZE = 64


def combinations(
    temperatures: Sequence[float],
    top_ps: Sequence[float | None],
    guidance_scales: Sequence[float],
    guidance_powers: Sequence[float | None] = (None,),
) -> list[Sampling]:
    """Every temperature with every top-p and guidance; a power without guidance is left out."""
    return [
        Sampling(temperature=temperature, top_p=top_p, guidance_scale=scale, guidance_power=power)
        for temperature, top_p, scale in itertools.product(temperatures, top_ps, guidance_scales)
        for power in (guidance_powers if scale != 1 else [None])
    ]


def setting_name(sampling: Sampling) -> str:
    """What a report calls a setting: "plain" or what differs from that, as in "temperature=0.9 guidance_scale=2"."""
    return " ".join(f"{name}={value:g}" for name, value in sampling.changes.items()) or "plain"


@torch.no_grad()
def evaluate_sampling(
    model: IsicVQModel,
    yardsticks: Sequence[Yardstick],
    reference: str,
    settings: Sequence[Sampling],
    work_dir: Path,
    *,
    split: str = "validation",
    seed: int = 0,
    max_corrupt_share: float = 0.01,
    progress: bool = False,
) -> list[Metric]:
    """Generate what is not there yet, and measure every setting against the real images.

    Args:
        model: a whole model; it is put into eval mode and left there.
        yardsticks: at least one.
        reference: URI of real images that the model was not trained on, of diagnoses it knows.
        settings: ways of drawing codes, no two alike.
        work_dir: the study's folder, see the module.
        split: what the lines call the real images.
        seed: of the samples and of the intervals' halves.
        max_corrupt_share: share of unreadable images past which to fail.
        progress: show a bar while images are generated.

    Returns:
        For each setting and yardstick the lines of `distance_metrics`, and of `agreement_metrics` where the yardstick is a
        classifier, with `setting_name` as the label `images`.

    Raises:
        ValueError: no yardsticks or settings, two settings alike, or a folder of another model or seed.
        DataError: the images cannot be used.
    """
    names = [setting_name(sampling) for sampling in settings]
    if not yardsticks or not names or len(set(names)) < len(names):
        raise ValueError(
            f"the settings are {names}, by {len(yardsticks)} yardsticks: expected at least one, each once"
        )
    model.eval()
    yardsticks = [yardstick.to(model.device) for yardstick in yardsticks]
    classes = Classes.of_model(model.config.class_names.values())
    source = find_source(reference, classes)
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)

    def embedded(batches: Iterable[Batch]) -> EmbeddedImages:
        images = EmbeddedImages(yardsticks)
        for batch in batches:
            images.add(batch["pixel_values"].to(model.device), batch["diagnoses"])
        return images

    real = embedded(iter_batches(source.records(), processor, BATCH_SIZE, None, max_corrupt_share))
    sets = {}
    for name, sampling in zip(names, settings, strict=True):
        folder = work_dir / name.replace(" ", ",")
        generate_shards(
            model, folder, len(real.diagnoses), real.diagnoses, sampling, seed=seed, progress=progress
        )
        shards = find_source(f"parquet:{folder / 'images-*.parquet'}", classes).dataset()
        sets[name] = embedded(iter_batches(shards, processor, BATCH_SIZE))
    metrics, on = [], MeasuredOn(split, source.name)
    for yardstick in yardsticks:
        metrics += distance_metrics(real, sets, yardstick.name, on, seed)
        if yardstick.classifier is not None:
            named = {"real": real.named[yardstick.name]}
            named |= {name: images.named[yardstick.name] for name, images in sets.items()}
            known = shared_classes(yardstick.classifier, model.config.class_names.values(), yardstick.name)
            metrics += agreement_metrics(named, real.diagnoses, known, yardstick.name, on, seed)
    return metrics
