"""What the models of a generalization study reach on images of their own and of other sources, and what may be said of it."""

import io
import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import find_source
from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval
from isic_vq.evaluation.measures import auroc, psnr
from isic_vq.evaluation.report import Metric
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.studies.generalization import GeneralizationRecipe, Setting, domain_file, settings
from isic_vq.studies.measure import Difference, measure_chain, paired_difference, unpaired_difference
from isic_vq.studies.page import SMOKE, StudyPage, markdown_table, over_seeds, recipe_table

NAMES = {
    "psnr": ("PSNR", "dB", 2),
    "ssim": ("SSIM", "1", 3),
    "bits_per_code": ("bits per code", "bits per code", 2),
}
WEBP_QUALITY = 10  # of 100
QUESTION = (
    "A tokenizer and a prior are trained on the images of some clinics alone, on equally many of each, and on all images, with and without "
    "dihedral views (the eight turns and reflections), with each seed. They are measured on held-out images of every clinic and on another "
    "data set. Where two models are compared on the same images the difference is taken image by image. Whether likelihood notices the other "
    "source is told by AUROC (0.5 is not at all) of bits per code, other images against the model's own held-out ones. WebP, which was trained "
    "on nothing, tells how hard the images are."
)


@dataclass(frozen=True)
class Measured:
    """One model of the study.

    Attributes:
        setting: which.
        values: by data set, `(N,)` float64 of every image for each of `NAMES`.
        disjoint: names of the data sets that share no image with the model's own held-out ones.
    """

    setting: Setting
    values: dict[str, dict[str, Tensor]]
    disjoint: frozenset[str]

    @property
    def labels(self) -> dict[str, str]:
        """The setting as labels of metrics."""
        augmentation = "augmented" if self.setting.augment else "plain"
        return {"domain": self.setting.domain, "augmentation": augmentation}

    @property
    def label(self) -> str:
        """What tables and findings call the setting."""
        return ", ".join(self.labels.values())

    @cached_property
    def shift(self) -> dict[str, Metric]:
        """By every disjoint data set, how well bits per code tell its images from the model's own."""
        own = self.values[self.setting.domain]["bits_per_code"]
        return {
            name: shift_metric(self.labels, own, values["bits_per_code"], name, self.setting.seed)
            for name, values in self.values.items()
            if name in self.disjoint
        }


Groups = dict[tuple[str, bool], list[Measured]]


def image_sets(recipe: GeneralizationRecipe) -> dict[str, str]:
    """URI of every set of images that models are measured on, by name: the domains' held-out ones, and the others."""
    held_out = {name: f"parquet:{domain_file(recipe, name, 'validation')}" for name in recipe.domains}
    return {**held_out, **recipe.tests}


def generalization_page(recipe: GeneralizationRecipe, smoke: bool = False) -> StudyPage:
    """Measure all models of a study, which are trained, and say what was found."""
    sets = image_sets(recipe)
    ids = {name: {row["isic_id"] for row in find_source(uri).metadata()} for name, uri in sets.items()}
    measured = []
    for setting in settings(recipe):
        kept = {name: measure_chain(setting.chain, name, uri) for name, uri in sets.items()}
        values = {name: {key: of[key].double() for key in NAMES} for name, of in kept.items()}
        disjoint = frozenset(name for name in sets if not ids[name] & ids[setting.domain])
        measured.append(Measured(setting, values, disjoint))
    groups: Groups = {}
    for one in measured:
        groups.setdefault((one.setting.domain, one.setting.augment), []).append(one)
    webp = {name: webp_psnr(uri) for name, uri in sets.items()}
    page = StudyPage("generalization", "What happens on images of another source?", QUESTION, smoke=smoke)
    for name, quality in webp.items():
        labels = {"codec": "WebP", "quality": f"quality {WEBP_QUALITY}"}
        page.metrics.append(MeasuredOn(name, name).mean("psnr", quality, "dB", None, **labels))
    for one in measured:
        page.metrics += model_metrics(one)
    page.tables = [
        (f"{what}, {unit}" if unit not in ("1", what) else what, table(groups, webp, key))
        for key, (what, unit, _) in NAMES.items()
    ]
    page.tables.append(("Likelihood as a detector of other sources, AUROC", shift_table(groups)))
    page.tables.append(("How they were trained", recipe_table(recipe.vqvae, recipe.prior)))
    page.figures = figures(groups, SMOKE if smoke else None)
    page.findings = findings(groups, webp, recipe, page.differences)
    return page


def webp_psnr(uri: str) -> Tensor:
    """PSNR in dB of every image of a source after WebP of quality `WEBP_QUALITY`, `(N,)` float64."""
    from PIL import Image

    processor, found = IsicVQImageProcessor(), []
    for batch in iter_batches(find_source(uri).records(), processor, 32):
        for pixels in processor.postprocess(batch["pixel_values"], output_type="np"):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
            pair = (torch.tensor(np.asarray(image))[None].double() for image in (pixels, Image.open(buffer)))
            found.append(psnr(*(image / 255 for image in pair)))
    return torch.cat(found)


def model_metrics(measured: Measured) -> list[Metric]:
    """The report's lines for one model; the seed is that of its training."""
    seed, metrics = measured.setting.seed, []
    for name, values in measured.values.items():
        on = MeasuredOn(name, name)
        metrics += [
            on.mean(key, values[key], unit, seed, **measured.labels) for key, (_, unit, _) in NAMES.items()
        ]
    return [*metrics, *measured.shift.values()]


def shift_metric(labels: dict[str, str], own: Tensor, other: Tensor, name: str, seed: int) -> Metric:
    """How well bits per code `(N,)` of own images are told from those `(M,)` of others."""
    is_other = torch.arange(len(own) + len(other)) >= len(own)
    interval = bootstrap_interval(
        lambda is_other, bits: auroc(torch.from_numpy(bits[~is_other]), torch.from_numpy(bits[is_other])),
        is_other, torch.cat([own, other]), strata=is_other, seed=seed,
    )  # fmt: skip
    area, on = auroc(own, other), MeasuredOn(name, name)
    return on.metric("shift_auroc", area, "1", len(is_other), seed, interval, **labels)


def table(groups: Groups, webp: dict[str, Tensor], key: str) -> str:
    """A row per setting, a column per data set: means over seeds, each seed in brackets."""
    digits = NAMES[key][2]
    rows = [
        [
            models[0].label,
            *(over_seeds([one.values[name][key].mean().item() for one in models], digits) for name in webp),
        ]
        for models in groups.values()
    ]
    if key == "psnr":
        rows.append(
            [
                f"WebP, quality {WEBP_QUALITY}",
                *(f"{values.mean().item():.{digits}f}" for values in webp.values()),
            ]
        )
    head = [f"{name} (n = {len(values):,})" for name, values in webp.items()]
    return markdown_table(["trained on", *head], rows)


def shift_table(groups: Groups) -> str:
    """A row per setting, a column per data set."""
    names = list(next(iter(groups.values()))[0].values)
    rows = []
    for models in groups.values():
        cells = [
            over_seeds([one.shift[name].value for one in models], 3) if name in models[0].disjoint else ""
            for name in names
        ]
        rows.append([models[0].label, *cells])
    return markdown_table(["trained on", *names], rows)


def figures(groups: Groups, mark: str | None) -> list[tuple[str, str, bytes]]:
    """PSNR and bits per code of every model on every data set."""
    from isic_vq.figures.comparisons import Point, dots
    from isic_vq.figures.plots import png_bytes

    drawn = []
    for key in ("psnr", "bits_per_code"):
        what, unit, _ = NAMES[key]
        title = f"{what} by training and test images" + (f" ({mark})" if mark else "")
        points: dict[str, list[Point]] = {}
        for models in groups.values():
            for one in models:
                for name, values in one.values.items():
                    metric = MeasuredOn(name, name).mean(key, values[key], unit)
                    label = f"{one.label}, seed {one.setting.seed}"
                    points.setdefault(f"on {name}", []).append(Point(label, metric.value, metric.interval))
        figure = dots(points, title, unit)
        drawn.append(
            (
                key.replace("_", "-"),
                f"{what} of every model on every data set, with 95 % intervals.",
                png_bytes(figure),
            )
        )
    return drawn


def findings(
    groups: Groups, webp: dict[str, Tensor], recipe: GeneralizationRecipe, noted: dict[str, Difference]
) -> list[str]:
    """Sentences on sources and augmentation, each only as strong as all seeds allow.

    Args:
        groups: the models of each setting, one per seed.
        webp: PSNR of every image of each data set after WebP.
        recipe: of the study.
        noted: filled with the differences that the sentences tell, by name.
    """
    said = []
    sized = [name for name in recipe.domains if recipe.domains[name].get("num_images") is not None]
    for images, other in itertools.permutations(sized, 2):
        said.append(transfer(groups, images, other, noted))
    for domain in recipe.domains:
        for name in recipe.tests:
            said.append(gap(groups[domain, False], webp, name, noted))
    for (domain, augment), models in groups.items():
        if augment:
            said.append(augmentation(groups[domain, False], models, noted))
    return [*said, *(shift(models) for models in groups.values())]


def values_of(models: list[Measured], name: str, key: str) -> list[Tensor]:
    """What every seed's model has for a data set's images."""
    return [one.values[name][key] for one in models]


def transfer(groups: Groups, images: str, other: str, noted: dict[str, Difference]) -> str:
    """What it costs, on the images of one source, to have trained on another one instead."""
    home, away = groups[images, False], groups[other, False]
    of = {
        key: paired_difference(values_of(home, images, key), values_of(away, images, key))
        for key in ("psnr", "bits_per_code")
    }
    noted.update({f"{key}[on {images}, {home[0].label} -> {away[0].label}]": one for key, one in of.items()})
    return (
        f"On {images} images, a tokenizer trained on {other} instead of {images}: {of['psnr'].change('PSNR', 'dB')}; its own prior on "
        f"its own codes: {of['bits_per_code'].change('bits per code')}."
    )


def gap(models: list[Measured], webp: dict[str, Tensor], name: str, noted: dict[str, Difference]) -> str:
    """How much worse another data set does, beside a codec that was not trained."""
    domain = models[0].setting.domain
    of = {
        key: unpaired_difference(values_of(models, domain, key), values_of(models, name, key))
        for key in ("psnr", "bits_per_code")
    }
    noted.update({f"{key}[{models[0].label}, {domain} -> {name}]": one for key, one in of.items()})
    untrained = unpaired_difference([webp[domain]], [webp[name]])
    noted[f"psnr[WebP, {domain} -> {name}]"] = untrained
    ((low, high),) = untrained.intervals
    return (
        f"From held-out {domain} images to {name}, of the model trained on {domain}: {of['psnr'].change('PSNR', 'dB')}; "
        f"{of['bits_per_code'].change('bits per code')}. WebP's PSNR, which tells how much of that is in the images, changes by "
        f"{untrained.mean:+.2f} dB ({low:+.2f} to {high:+.2f})."
    )


def augmentation(plain: list[Measured], augmented: list[Measured], noted: dict[str, Difference]) -> str:
    """What training in all dihedral views changes on every data set."""
    parts = []
    for name in plain[0].values:
        of = {
            key: paired_difference(values_of(plain, name, key), values_of(augmented, name, key))
            for key in ("psnr", "bits_per_code")
        }
        noted.update(
            {f"{key}[on {name}, {plain[0].label} -> {augmented[0].label}]": one for key, one in of.items()}
        )
        parts.append(
            f"on {name} {of['psnr'].change('PSNR', 'dB')} and {of['bits_per_code'].change('bits per code')}"
        )
    return f"Augmentation, trained on {plain[0].setting.domain}: {'; '.join(parts)}."


def shift(models: list[Measured]) -> str:
    """Which disjoint data sets likelihood tells from the model's own, by the intervals of two seeds or more."""
    parts = []
    for name in models[0].shift:
        metrics = [one.shift[name] for one in models]
        values = ", ".join(f"{metric.value:.2f}" for metric in metrics)
        bounds = [metric.interval or [0.0, 1.0] for metric in metrics]
        if len(bounds) > 1 and all(low > 0.5 for low, _ in bounds):
            verdict = "dearer than its own"
        elif len(bounds) > 1 and all(high < 0.5 for _, high in bounds):
            verdict = "cheaper than its own"
        else:
            verdict = "not told from its own by all seeds"
        parts.append(f"{name} images are {verdict} (AUROC {values})")
    return f"Likelihood of the model trained on {models[0].label}: {'; '.join(parts)}."
