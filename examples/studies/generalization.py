"""How do models do on images of another source? `python examples/studies/generalization.py examples/configs/generalization.yaml`."""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chain import Chain
from command import run_study
from generalization_recipe import GeneralizationRecipe, chains, domain_file, labels, write_domains
from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import find_source
from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval, mean_interval
from isic_vq.evaluation.measures import auroc, psnr
from isic_vq.evaluation.report import Metric
from isic_vq.evaluation.report_tables import markdown_table
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from measure import Difference, measure_chain, paired_difference, unpaired_difference
from page import SMOKE, StudyPage, over_seeds, recipe_table
from smoke import IMAGES, few, smoke_recipe

NAMES = {
    "psnr": ("PSNR", "dB", 2),
    "ssim": ("SSIM", "1", 3),
    "bits_per_code": ("bits per code", "bits per code", 2),
}
COMPARED = ("psnr", "bits_per_code")  # what findings and figures tell
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
        values: by data set, `(N,)` float64 of every image for each of `NAMES`.
        disjoint: names of the data sets that share no image with the model's own held-out ones.
    """

    chain: Chain
    values: dict[str, dict[str, Tensor]]
    disjoint: frozenset[str]

    @property
    def domain(self) -> str:
        """What it was trained on."""
        return self.chain.labels["domain"]

    @cached_property
    def shift(self) -> dict[str, Metric]:
        """By every disjoint data set, how well bits per code tell its images from the model's own."""
        own, seed = self.values[self.domain]["bits_per_code"], self.chain.seed
        return {
            name: shift_metric(
                own, values["bits_per_code"], MeasuredOn(name, name), seed, **self.chain.labels
            )
            for name, values in self.values.items()
            if name in self.disjoint
        }


Groups = dict[str, list[Measured]]  # the models of each setting, one per seed, by its label


def image_sets(recipe: GeneralizationRecipe) -> dict[str, str]:
    """URI of every set of images that models are measured on, by name: the domains' held-out ones, and the others."""
    held_out = {name: f"parquet:{domain_file(recipe, name, 'validation')}" for name in recipe.domains}
    return {**held_out, **recipe.tests}


def generalization_page(recipe: GeneralizationRecipe, smoke: bool = False) -> StudyPage:
    """Measure all models of a study, which are trained, and say what was found."""
    sets = image_sets(recipe)
    ids = {name: {row["isic_id"] for row in find_source(uri).metadata()} for name, uri in sets.items()}
    groups: Groups = {}
    for chain in chains(recipe):
        kept = {name: measure_chain(chain, name, uri) for name, uri in sets.items()}
        values = {name: {key: numbers[key].double() for key in NAMES} for name, numbers in kept.items()}
        own = ids[chain.labels["domain"]]
        disjoint = frozenset(name for name in sets if not ids[name] & own)
        groups.setdefault(chain.label, []).append(Measured(chain, values, disjoint))
    webp = {name: webp_psnr(uri) for name, uri in sets.items()}
    page = StudyPage("generalization", "What happens on images of another source?", QUESTION, smoke=smoke)
    codec = {"codec": "WebP", "quality": f"quality {WEBP_QUALITY}"}
    page.metrics = [
        MeasuredOn(name, name).mean("psnr", values, "dB", None, **codec) for name, values in webp.items()
    ]
    # By seed, as the models were trained.
    for model in itertools.chain.from_iterable(zip(*groups.values(), strict=True)):
        page.metrics += model_metrics(model)
    page.tables = [
        (f"{title}, {unit}" if unit not in ("1", title) else title, table(groups, webp, key))
        for key, (title, unit, _) in NAMES.items()
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
    seed, of = measured.chain.seed, measured.chain.labels
    return [
        *(
            MeasuredOn(name, name).mean(key, values[key], unit, seed, **of)
            for name, values in measured.values.items()
            for key, (_, unit, _) in NAMES.items()
        ),
        *measured.shift.values(),
    ]


def shift_metric(own: Tensor, other: Tensor, on: MeasuredOn, seed: int, **of: str) -> Metric:
    """How well bits per code `(N,)` of own images are told from those `(M,)` of others."""
    is_other = torch.arange(len(own) + len(other)) >= len(own)
    interval = bootstrap_interval(
        lambda is_other, bits: auroc(torch.from_numpy(bits[~is_other]), torch.from_numpy(bits[is_other])),
        is_other, torch.cat([own, other]), strata=is_other, seed=seed,
    )  # fmt: skip
    return on.metric("shift_auroc", auroc(own, other), "1", len(is_other), seed, interval, **of)


def table(groups: Groups, webp: dict[str, Tensor], key: str) -> str:
    """A row per setting, a column per data set: means over seeds, each seed in brackets."""
    digits = NAMES[key][2]
    rows = [
        [label, *(over_seeds([m.values[name][key].mean().item() for m in models], digits) for name in webp)]
        for label, models in groups.items()
    ]
    if key == "psnr":
        means = [f"{values.mean().item():.{digits}f}" for values in webp.values()]
        rows.append([f"WebP, quality {WEBP_QUALITY}", *means])
    return markdown_table(
        ["trained on", *(f"{name} (n = {len(values):,})" for name, values in webp.items())], rows
    )


def shift_table(groups: Groups) -> str:
    """A row per setting, a column per data set."""
    names = list(next(iter(groups.values()))[0].values)
    rows = [
        [
            label,
            *(
                over_seeds([m.shift[name].value for m in models], 3) if name in models[0].disjoint else ""
                for name in names
            ),
        ]
        for label, models in groups.items()
    ]
    return markdown_table(["trained on", *names], rows)


def figures(groups: Groups, mark: str | None) -> list[tuple[str, str, bytes]]:
    """PSNR and bits per code of every model on every data set."""
    from isic_vq.figures.plots import Point, dots, png_bytes

    drawn = []
    for key in COMPARED:
        title, unit, _ = NAMES[key]
        points: dict[str, list[Point]] = {}
        for model in itertools.chain.from_iterable(groups.values()):
            for name, values in model.values.items():
                label, numbers = f"{model.chain.label}, seed {model.chain.seed}", values[key]
                point = Point(label, numbers.mean().item(), mean_interval(numbers))
                points.setdefault(f"on {name}", []).append(point)
        figure = dots(points, f"{title} by training and test images" + (f" ({mark})" if mark else ""), unit)
        caption = f"{title} of every model on every data set, with 95 % intervals."
        drawn.append((key.replace("_", "-"), caption, png_bytes(figure)))
    return drawn


def findings(
    groups: Groups, webp: dict[str, Tensor], recipe: GeneralizationRecipe, noted: dict[str, Difference]
) -> list[str]:
    """Sentences on sources and augmentation, each only as strong as all seeds allow; `noted` is filled with the differences that they tell."""
    plain, augmented = ({d: groups[key(d, augment)] for d in recipe.domains} for augment in (False, True))
    sized = [name for name, fields in recipe.domains.items() if fields.get("num_images") is not None]
    return [
        *(transfer(plain, *pair, noted) for pair in itertools.permutations(sized, 2)),
        *(gap(plain[domain], webp, name, noted) for domain in recipe.domains for name in recipe.tests),
        *(augmentation(plain[domain], augmented[domain], noted) for domain in recipe.domains),
        *(shift(models) for models in groups.values()),
    ]


def key(domain: str, augment: bool) -> str:
    """The label of a setting."""
    return ", ".join(labels(domain, augment).values())


def values_of(models: list[Measured], name: str, key: str) -> list[Tensor]:
    """What every seed's model has for a data set's images."""
    return [model.values[name][key] for model in models]


def paired(first: list[Measured], second: list[Measured], on: str, noted: dict[str, Difference]) -> list[str]:
    """How PSNR and bits per code of the second models differ from the first's on one data set, in words; noted, too."""
    found = {
        key: paired_difference(values_of(first, on, key), values_of(second, on, key)) for key in COMPARED
    }
    step = f"{first[0].chain.label} -> {second[0].chain.label}"
    noted.update({f"{key}[on {on}, {step}]": difference for key, difference in found.items()})
    return changes(found)


def changes(found: dict[str, Difference]) -> list[str]:
    """Differences of PSNR and bits per code in words."""
    return [found["psnr"].change("PSNR", "dB"), found["bits_per_code"].change("bits per code")]


def transfer(plain: Groups, images: str, other: str, noted: dict[str, Difference]) -> str:
    """What it costs, on the images of one source, to have trained on another one instead."""
    psnr, bits = paired(plain[images], plain[other], images, noted)
    return f"On {images} images, a tokenizer trained on {other} instead of {images}: {psnr}; its own prior on its own codes: {bits}."


def gap(models: list[Measured], webp: dict[str, Tensor], name: str, noted: dict[str, Difference]) -> str:
    """How much worse another data set does, beside a codec that was not trained."""
    domain = models[0].domain
    found = {
        key: unpaired_difference(values_of(models, domain, key), values_of(models, name, key))
        for key in COMPARED
    }
    label = models[0].chain.label
    noted.update({f"{key}[{label}, {domain} -> {name}]": difference for key, difference in found.items()})
    untrained = unpaired_difference([webp[domain]], [webp[name]])
    noted[f"psnr[WebP, {domain} -> {name}]"] = untrained
    ((low, high),) = untrained.intervals
    return (
        f"From held-out {domain} images to {name}, of the model trained on {domain}: {'; '.join(changes(found))}. "
        f"WebP's PSNR, which tells how much of that is in the images, changes by {untrained.mean:+.2f} dB "
        f"({low:+.2f} to {high:+.2f})."
    )


def augmentation(plain: list[Measured], augmented: list[Measured], noted: dict[str, Difference]) -> str:
    """What training in all dihedral views changes on every data set."""
    parts = [f"on {name} {' and '.join(paired(plain, augmented, name, noted))}" for name in plain[0].values]
    return f"Augmentation, trained on {plain[0].domain}: {'; '.join(parts)}."


def shift(models: list[Measured]) -> str:
    """Which disjoint data sets likelihood tells from the model's own, by the intervals of two seeds or more."""
    parts = []
    for name in models[0].shift:
        metrics = [model.shift[name] for model in models]
        values = ", ".join(f"{metric.value:.2f}" for metric in metrics)
        bounds = [metric.interval or [0.0, 1.0] for metric in metrics]
        if len(bounds) > 1 and all(low > 0.5 for low, _ in bounds):
            verdict = "dearer than its own"
        elif len(bounds) > 1 and all(high < 0.5 for _, high in bounds):
            verdict = "cheaper than its own"
        else:
            verdict = "not told from its own by all seeds"
        parts.append(f"{name} images are {verdict} (AUROC {values})")
    return f"Likelihood of the model trained on {models[0].chain.label}: {'; '.join(parts)}."


def shortened_study(recipe: GeneralizationRecipe) -> GeneralizationRecipe:
    """The recipe with few steps, and few images of each domain and test set."""
    recipe = smoke_recipe(recipe)
    folder = Path(recipe.output_dir, "smoke")
    domains = {
        name: {**fields, "num_images": min(IMAGES, fields.get("num_images") or IMAGES)}
        for name, fields in recipe.domains.items()
    }
    tests = {name: few(uri, folder / f"{name}.parquet") for name, uri in recipe.tests.items()}
    return dataclasses.replace(recipe, domains=domains, tests=tests)


def open_chains(recipe: GeneralizationRecipe) -> Iterator[Chain]:
    """Write the images of every domain, and yield the models that are trained on them."""
    write_domains(recipe)
    return chains(recipe)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    description = "Measure models on images of other sources, trained with and without augmentation."
    run_study(GeneralizationRecipe, shortened_study, open_chains, generalization_page, description, arguments)


if __name__ == "__main__":
    main()
