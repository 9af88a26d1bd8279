"""Which way of drawing codes brings generated images closest to real ones, and makes them look like their diagnosis?

For each setting of temperature, top-p and guidance as many images are generated as there are real ones, image i for
the diagnosis of real image i, all with one seed: settings share their uniforms, so that their differences are less
noisy than each number. Distances and agreement are those of `isic_vq.evaluation.generation`. A setting that is
chosen by such a table has seen these images: what it reaches must be told of others, or with that said.

In the work folder: a folder of shards for each setting, which is not made again.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from command import errors_in_one_line
from isic_vq.data.classes import Classes
from isic_vq.data.loading import Batch, iter_batches
from isic_vq.data.sources import find_source
from isic_vq.evaluation.generation import (
    EmbeddedImages,
    Yardstick,
    agreement_metrics,
    distance_metrics,
    shared_classes,
)
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Metric, Report, environment
from isic_vq.generate import generate_shards
from isic_vq.hub.pretrained import load_model, resolve
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
    return " ".join(f"{name}={value:g}" for name, value in sampling.changes().items()) or "plain"


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study: every temperature with every top-p and guidance."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="URI of real images, as for isic-vq evaluate")
    parser.add_argument(
        "--features",
        required=True,
        nargs="+",
        help="folders or Hub ids of image models, as for isic-vq evaluate",
    )
    parser.add_argument("-m", "--model", help="model folder or Hub id; default: the shipped checkpoint")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.json"), help="report to write")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("runs/sampling"),
        help="folder of generated images, which are kept",
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0], help="1 is off")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0], help="1 is off")
    parser.add_argument(
        "--guidance-power", type=float, nargs="+", default=[0.0], help="of guidance that grows; 0 is off"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the generated images and of resampling")
    parser.add_argument("--split", default="validation", help="what the report calls the real images")
    parser.add_argument(
        "--max-corrupt-share", type=float, default=0.01, help="share of unreadable images past which to fail"
    )
    options = parser.parse_args(arguments)
    with errors_in_one_line():
        top_ps = [None if value == 1 else value for value in options.top_p]
        powers = [value or None for value in options.guidance_power]
        settings = combinations(options.temperature, top_ps, options.guidance_scale, powers)
        model = load_model(IsicVQModel, options.model)
        classes = list(model.config.class_names.values())
        metrics = evaluate_sampling(
            model,
            [Yardstick.from_pretrained(name, classes) for name in options.features],
            options.data,
            settings,
            options.work_dir,
            split=options.split,
            seed=options.seed,
            max_corrupt_share=options.max_corrupt_share,
            progress=sys.stderr.isatty(),
        )
        about = {
            "name": Path(resolve(options.model)).name,
            "settings": [asdict(setting) for setting in settings],
        }
        Report(about, metrics, environment=environment()).save(options.out)
        for metric in metrics:
            print(f"  {metric.text:<50} {metric.value:>10.5g} {metric.unit}, n = {metric.n}")
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
