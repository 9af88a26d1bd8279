"""What the models of a granularity study reach and cost, and what may be said of it."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isic_vq.data.code_cache import read_code_cache
from isic_vq.data.sources import find_source
from isic_vq.evaluation.codebook import code_counts, codebook_metrics
from isic_vq.evaluation.cost import MODEL, seconds
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.likelihood import unigram_bits
from isic_vq.evaluation.report import Metric
from isic_vq.hub import load_model
from isic_vq.models.modeling_isic_vq import BLOCK_SIZE, IsicVQModel
from isic_vq.models.vector_quantizer import usage_and_perplexity
from isic_vq.studies.granularity import GranularityRecipe, Setting, settings
from isic_vq.studies.measure import Difference, flops_per_image, measure_chain, paired_difference
from isic_vq.studies.page import SMOKE, StudyPage, markdown_table, over_seeds, recipe_table

DATA = "validation"
PER_IMAGE = {"psnr": "dB", "ssim": "1", "bits_per_code": "bits per code", "coded_bytes": "bytes per image"}
QUESTION = (
    "Images are quantized more finely by more codes or by a finer grid of them. Too coarse loses detail, too fine costs: more bytes per "
    "image, and a prior that has more to learn and to draw. Tokenizers of each codebook size on each grid, and a prior for each, are "
    "trained alike with each seed and measured on images that none of them saw. `coded bytes` is what an ideal entropy coder driven by "
    "the prior takes (without a class), `flat` what codes take as they are."
)


@dataclass(frozen=True)
class Measured:
    """One model of the study.

    Attributes:
        setting: which.
        values: `(N,)` float64 of every image, by name as in `PER_IMAGE`, and `unigram_bytes`.
        numbers: `perplexity`, `flat_bytes` and operations, by name.
        code_counts: `(N, K)`, uses of each code by each image.
        seconds: per image of drawing and decoding a block of `BLOCK_SIZE` images, of several runs.
    """

    setting: Setting
    values: dict[str, Tensor]
    numbers: dict[str, float]
    code_counts: Tensor
    seconds: Tensor

    @property
    def labels(self) -> dict[str, str]:
        """The setting as labels of metrics."""
        return {"grid": self.setting.grid, "codebook": f"{self.setting.num_codes} codes"}

    @property
    def label(self) -> str:
        """What differences between settings are called by."""
        return ", ".join(self.labels.values())


def measure_setting(setting: Setting, uri: str) -> Measured:
    """Measure a finished model of the study; reconstruction and likelihood are measured once and kept.

    Args:
        setting: the model.
        uri: of the images.
    """
    chain = setting.chain
    kept = measure_chain(chain, DATA, uri)
    model = load_model(IsicVQModel, str(chain.model)).eval()
    positions = model.config.vqvae_config.num_positions
    values = {name: kept[name].double() for name in ("psnr", "ssim", "bits_per_code")}
    values["coded_bytes"] = values["bits_per_code"] * positions / 8
    train, held_out = (read_code_cache(chain.folder / f"{name}.parquet") for name in ("train", "validation"))
    codes = torch.from_numpy(held_out.codes[:, 0].astype("int64"))
    values["unigram_bytes"] = unigram_bits(train.counts(), codes).flatten(1).sum(1) / 8
    _, perplexity = usage_and_perplexity(kept["codebook_counts"])
    flops = flops_per_image(model)
    loops = {"tokenizer": chain.vqvae["loop"], "prior": chain.prior["loop"]}
    # A step back costs twice a step forward: the gradients of inputs and of weights.
    training = sum(3 * flops[part] * loop["max_steps"] * loop["batch_size"] for part, loop in loops.items())
    return Measured(
        setting,
        values,
        {
            "perplexity": perplexity,
            "flat_bytes": positions * math.log2(setting.num_codes) / 8,
            "training_flops": float(training),
            "sampling_flops": float(flops["prior"] + flops["decoder"]),
        },
        code_counts(codes, setting.num_codes),
        seconds(partial(model.generate, BLOCK_SIZE, seed=0), model.device) / BLOCK_SIZE,
    )


def granularity_page(recipe: GranularityRecipe, smoke: bool = False) -> StudyPage:
    """Measure all models of a study, which are trained, and say what was found."""
    measured = [measure_setting(setting, recipe.validation) for setting in settings(recipe)]
    name = find_source(recipe.validation).name
    page = StudyPage("granularity", "How fine should images be quantized?", QUESTION, smoke=smoke)
    for one in measured:
        page.metrics += setting_metrics(one, MeasuredOn(DATA, name))
    page.tables = [
        ("Models", models_table(measured, recipe)),
        ("How they were trained", recipe_table(recipe.vqvae, recipe.prior)),
    ]
    page.figures = figures(measured, recipe, SMOKE if smoke else None)
    page.findings = findings(measured, recipe)
    page.differences = differences(by_setting(measured))
    return page


UNITS = {
    "flat_bytes": "bytes per image",
    "training_flops": "floating-point operations",
    "sampling_flops": "floating-point operations per image",
}


def setting_metrics(measured: Measured, on: MeasuredOn) -> list[Metric]:
    """The report's lines for one model; the seed is that of its training."""
    seed, labels = measured.setting.seed, measured.labels
    means = {**PER_IMAGE, "unigram_bytes": "bytes per image"}
    used = codebook_metrics(measured.code_counts, on, 0, **labels)
    return [
        *(on.mean(name, measured.values[name], unit, seed, **labels) for name, unit in means.items()),
        *(dataclasses.replace(metric, seed=seed) for metric in used),
        *(
            MODEL.metric(name, measured.numbers[name], unit, 1, seed, None, **labels)
            for name, unit in UNITS.items()
        ),
        MODEL.mean("sampling_seconds", measured.seconds, "s per image", seed, **labels),
    ]


def by_setting(measured: list[Measured]) -> dict[tuple[str, int], list[Measured]]:
    """The models of each grid and codebook size, one per seed."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for one in measured:
        found.setdefault((one.setting.grid, one.setting.num_codes), []).append(one)
    return found


def models_table(measured: list[Measured], recipe: GranularityRecipe) -> str:
    """A row per setting: means over seeds, each seed in brackets."""
    rows = []
    for (grid, num_codes), models in by_setting(measured).items():
        means = {name: [one.values[name].mean().item() for one in models] for name in models[0].values}
        numbers = {name: [one.numbers[name] for one in models] for name in models[0].numbers}
        rows.append(
            [
                f"{grid}, {num_codes}",
                over_seeds(means["psnr"], 2),
                over_seeds(means["ssim"], 3),
                over_seeds(numbers["perplexity"], 0),
                over_seeds(means["bits_per_code"], 2),
                over_seeds(means["coded_bytes"], 0),
                over_seeds(means["unigram_bytes"], 0),
                f"{numbers['flat_bytes'][0]:.0f}",
                f"{numbers['training_flops'][0] / 1e12:.1f}",
                f"{numbers['sampling_flops'][0] / 1e9:.2f}",
                over_seeds([one.seconds.mean().item() for one in models], 3),
            ]
        )
    head = [
        "grid, codes",
        "PSNR, dB",
        "SSIM",
        "perplexity",
        "bits per code",
        "coded bytes",
        "unigram bytes",
        "flat bytes",
    ]
    return markdown_table([*head, "TFLOP to train", "GFLOP per sample", "s per sample"], rows)


def figures(
    measured: list[Measured], recipe: GranularityRecipe, mark: str | None
) -> list[tuple[str, str, bytes]]:
    """Curves over the codebook size, and of quality over bytes."""
    from isic_vq.figures.comparisons import Curve, curves
    from isic_vq.figures.plots import png_bytes

    groups = by_setting(measured)

    def seeds_of(name: str, grid: str, num_codes: int) -> list[float]:
        models = groups[grid, num_codes]
        if name == "sampling_seconds":
            return [one.seconds.mean().item() for one in models]
        return [one.values[name].mean().item() if name in one.values else one.numbers[name] for one in models]

    def panel(title: str, unit: str, name: str, over: str | None = None) -> tuple[str, str, list[Curve]]:
        drawn = []
        for grid in recipe.grids:
            each = [seeds_of(name, grid, k) for k in recipe.num_codes]
            x = (
                list(recipe.num_codes)
                if over is None
                else [_mean(seeds_of(over, grid, k)) for k in recipe.num_codes]
            )
            drawn.append(Curve(grid, x, [_mean(values) for values in each], list(zip(*each, strict=True))))
        return title, unit, drawn

    over_codes = curves(
        [
            panel("reconstruction", "PSNR in dB", "psnr"),
            panel("structure", "SSIM", "ssim"),
            panel("codes in use", "perplexity", "perplexity"),
            panel("prior", "bits per code", "bits_per_code"),
            panel("storage", "coded bytes per image", "coded_bytes"),
            panel("sampling", "seconds per image", "sampling_seconds"),
        ],
        "codebook size K",
        recipe.num_codes,
        mark,
    )
    largest = max(max(values) for values in (seeds_of("coded_bytes", *key) for key in groups))
    ticks = [2**power for power in range(5, 14) if 2**power < 1.3 * largest]
    rate = curves(
        [panel("rate and distortion", "PSNR in dB", "psnr", "coded_bytes")],
        "coded bytes per image",
        ticks,
        mark,
    )
    return [
        (
            "over-codebook-size",
            "By codebook size: lines are means over seeds, dots are seeds.",
            png_bytes(over_codes),
        ),
        ("rate-distortion", "Quality over storage: each line runs from few to many codes.", png_bytes(rate)),
    ]


def _mean(values: Any) -> float:
    return sum(values) / len(values)


def findings(measured: list[Measured], recipe: GranularityRecipe) -> list[str]:
    """Sentences on neighbouring settings, each only as strong as all seeds allow."""
    groups = by_setting(measured)
    said = []
    for grid in recipe.grids:
        for fewer, more in itertools.pairwise(sorted(recipe.num_codes)):
            said.append(
                compared(f"On {grid}, from {fewer} to {more} codes:", groups[grid, fewer], groups[grid, more])
            )
    for coarse, fine in itertools.pairwise(recipe.grids):
        for num_codes in recipe.num_codes:
            about = f"With {num_codes} codes, from {coarse} to {fine}:"
            said.append(compared(about, groups[coarse, num_codes], groups[fine, num_codes]))
    return [*said, *dominated(groups), *returns(groups, recipe)]


def compared(about: str, first: list[Measured], second: list[Measured]) -> str:
    """What going from one setting to the other gives and costs."""
    parts = [
        difference(first, second, "psnr").change("PSNR", "dB", 2),
        difference(first, second, "coded_bytes").change("the coded size", "bytes", 0),
    ]
    drawn = [models[0].numbers["sampling_flops"] for models in (first, second)]
    return (
        f"{about} {'; '.join(parts)}; drawing an image takes {drawn[1] / drawn[0]:.1f} times the operations."
    )


def difference(first: list[Measured], second: list[Measured], name: str) -> Difference:
    """Second minus first, image by image, seed by seed."""
    return paired_difference([one.values[name] for one in first], [one.values[name] for one in second])


def differences(groups: dict[tuple[str, int], list[Measured]]) -> dict[str, Difference]:
    """Every two settings' difference in quality and bytes, by name such as "psnr[f8, 64 codes -> f4, 64 codes]"."""
    return {
        f"{name}[{first[0].label} -> {second[0].label}]": difference(first, second, name)
        for first, second in itertools.combinations(groups.values(), 2)
        for name in ("psnr", "coded_bytes")
    }


def dominated(groups: dict[tuple[str, int], list[Measured]]) -> list[str]:
    """Settings that another one beats in quality and bytes at once, in every seed."""
    said = []
    for key, models in groups.items():
        for other, rivals in groups.items():
            better = (
                difference(models, rivals, "psnr").sign > 0
                and difference(models, rivals, "coded_bytes").sign < 0
            )
            if key != other and better:
                said.append(
                    f"{key[0]} with {key[1]} codes is beaten by {other[0]} with {other[1]}: "
                    f"{difference(models, rivals, 'psnr').change('PSNR', 'dB', 2)} and "
                    f"{difference(models, rivals, 'coded_bytes').change('the coded size', 'bytes', 0)}."
                )
    return said or ["No setting is beaten by another in quality and bytes at once."]


def returns(groups: dict[tuple[str, int], list[Measured]], recipe: GranularityRecipe) -> list[str]:
    """Where a step to more codes buys less quality per byte than the step before it did, by the intervals of all seeds."""
    said = []
    sizes = sorted(recipe.num_codes)
    for grid in recipe.grids:
        for fewer, some, more in zip(sizes, sizes[1:], sizes[2:], strict=False):
            gains, costs = (
                [difference(groups[grid, a], groups[grid, b], name) for a, b in ((fewer, some), (some, more))]
                for name in ("psnr", "coded_bytes")
            )
            if gains[0].sign <= 0 or any(cost.sign <= 0 for cost in costs):
                continue
            at_least = [low / c for (low, _), c in zip(gains[0].intervals, costs[0].means, strict=True)]
            at_most = [high / c for (_, high), c in zip(gains[1].intervals, costs[1].means, strict=True)]
            if all(later < earlier for earlier, later in zip(at_least, at_most, strict=True)):
                bought = [1000 * gain.mean / cost.mean for gain, cost in zip(gains, costs, strict=True)]
                said.append(
                    f"On {grid} detail gets dearer: a byte buys {bought[0]:.1f} thousandths of a dB from {fewer} to {some} codes "
                    f"and {bought[1]:.1f} from {some} to {more}."
                )
    return said
