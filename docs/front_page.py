"""What the README shows of the checkpoints: a table of models, five results, a picture of every class; and two tables of docs/."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import markdown_table, number_text, rounded
from isic_vq.figures.grid import BACKGROUND, image_grid
from isic_vq.models.configuration_isic_vq import IsicVQConfig

YARDSTICK = "derm-resnet"  # nothing was trained or chosen in it
GENERATED_AT_ONCE = "16"
PICTURES_OF_A_CLASS = 3
# Contestants of benchmarks/sampling.py, and what docs/sampling.md calls them.
SAMPLERS = {
    "full taps, a pass per position": "the whole network for every code",
    "pythae's sampler": "pythae's sampler (an ungated network)",
    "eager": "isic-vq, `eager`",
    "compiled": "isic-vq, `compiled`",
    "one full forward": "one forward pass, for comparison",
}
SCORES = {
    "bits_per_code": "bits per code",
    "typicality": "typicality",
    "complexity_corrected": "complexity-corrected",
    "unigram_corrected": "unigram-corrected",
}


def short(metric: Metric) -> str:
    """A value to the digits that its interval leaves, three at most."""
    return number_text(float(rounded(metric)[0].replace(",", "")))


def models_table(folders: tuple[Path, ...]) -> str:
    """A row for each repository of a whole model: size, quality, speed and licence, from its config and its evaluation."""
    rows = []
    for folder in folders:
        config = IsicVQConfig.from_pretrained(folder)
        report = Report.load(folder / "reports" / "evaluation.json")
        sides = config.vqvae_config.sides
        grids = f"{sides[0]}x{sides[0]}" + (f" to {sides[-1]}x{sides[-1]}" if len(sides) > 1 else "")
        distances = [
            short(report.find("frechet_distance", images=images, yardstick=YARDSTICK))
            for images in ("samples", "floor", "reconstructions")
        ]
        parameters = sum(report.value("parameters", part=part) for part in ("vqvae", "prior"))
        seconds = report.find("seconds_per_image", action="generate", batch=GENERATED_AT_ONCE)
        rows.append(
            [
                f"[`{folder.name}`](model_cards/{folder.name}/README.md)",
                f"{grids} of {config.vqvae_config.num_codes}",
                f"{parameters / 1e6:.1f} M",
                short(report.find("psnr", "validation")),
                "{} ({} to {})".format(*distances),
                short(seconds),
                str(config.license).upper().replace("CC-BY-NC-", "CC BY-NC "),
            ]
        )
    head = ["model", "codes", "parameters", "PSNR, dB", "Frechet distance (floor to ceiling)", "s per image"]
    return markdown_table([*head, "licence of weights"], rows)


def results_table(reports: dict[str, Report]) -> str:
    """Five questions about a checkpoint, and what its reports answer, in two or three digits."""
    evaluation, audit = reports["evaluation.json"], reports["memorization.json"]

    def agreement(images: str) -> str:
        return f"{evaluation.value('agreement', images=images, yardstick=YARDSTICK):.0%}"

    def auc(arm: str) -> str:
        return f"{reports['utility.json'].value('auc', 'validation', real='200', arm=arm):.2f}"

    copies = [metric for metric in audit.metrics if metric.name == "pairs_found"]
    rows = [
        [
            "How close are reconstructions?",
            f"PSNR {short(evaluation.find('psnr', 'validation'))} dB on held-out images",
            f"{short(evaluation.find('psnr', 'uda1'))} dB on images of another source",
        ],
        [
            "How well does the prior predict codes?",
            f"{short(evaluation.find('bits_per_code', 'validation'))} bits per code",
            f"{short(evaluation.find('bits_per_code_unigram', 'validation'))} by the codes' frequencies alone",
        ],
        [
            "Do images show the class asked for?",
            f"a classifier names it in {agreement('samples')} of them",
            f"in {agreement('reference')} of real images",
        ],
        [
            "Do images repeat training images?",
            f"{max(metric.value for metric in copies):g} of {copies[0].n} named as copies",
            f"likelihood tells training from held-out images with AUROC {audit.value('membership_auc'):.2f} (chance: 0.50)",
        ],
        [
            "Do they help a site that has 200 images?",
            f"a classifier's melanoma AUC is {auc('same mix 3:1')} with three generated images beside each real one",
            f"{auc('flips')} with the real ones alone ([more](docs/utility.md))",
        ],
    ]
    return markdown_table(["question", "isic-vq-128", "compare with"], rows, texts=3)


def sampling_table(races: list[dict[str, Any]]) -> str:
    """Seconds per image of each way to sample a 32x32 grid, by batch size; `races` are those of benchmarks/sampling.py."""
    contestants = {race["batch"]: race["contestants"] for race in races if race["grid"] == 32}
    rows = [
        [title, *(f"{found[name]['seconds_per_image']:.3g}" for found in contestants.values())]
        for name, title in SAMPLERS.items()
    ]
    return markdown_table(["sampler", *map(str, contestants)], rows)


def unusual_images_table(report: Report) -> str:
    """AUROC of every score for every kind of unusual images; `report` is that of `isic-vq evaluate --only ood`."""
    kinds = dict.fromkeys(metric.labels["images"] for metric in report.metrics if metric.name == "auroc")
    rows = [
        [kind, *(f"{report.value('auroc', score=score, images=kind):.2f}" for score in SCORES)]
        for kind in kinds
    ]
    return markdown_table(["unusual images", *SCORES.values()], rows)


def class_picture(folder: Path) -> Image.Image:
    """The first previews of every class in a column, with its name below."""
    config = IsicVQConfig.from_pretrained(folder)
    size, names = config.vqvae_config.image_size, list(config.prior_config.id2label.values())
    columns = []
    for name in names:
        with Image.open(folder / "previews" / f"{name}.png") as file:
            strip = np.asarray(file.convert("RGB"))
        lefts = [2 + index * (size + 2) for index in range(PICTURES_OF_A_CLASS)]
        columns.append([strip[2 : 2 + size, left : left + size] for left in lefts])
    images = np.stack([column[row] for row in range(PICTURES_OF_A_CLASS) for column in columns])
    head = image_grid(images[: len(names)], len(names), labels=[name.replace("_", " ") for name in names])
    rest = image_grid(images[len(names) :], len(names))
    picture = Image.new("RGB", (head.width, rest.height + head.height - 2), BACKGROUND)
    picture.paste(rest, (0, 0))
    picture.paste(head, (0, rest.height - 2))
    return picture


def read_json(path: Path) -> dict[str, Any]:
    """A report that is not a `Report`."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
