"""How fine should images be quantized? `python examples/studies/granularity.py examples/configs/granularity.yaml`."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from torch import Tensor

from chain import Chain
from command import run_study
from granularity_recipe import GranularityRecipe, chains, labels
from isic_vq.data.code_cache import read_code_cache
from isic_vq.data.sources import find_source
from isic_vq.evaluation.bits_per_code import unigram_bits
from isic_vq.evaluation.codebook import codebook_metrics
from isic_vq.evaluation.cost import MODEL, seconds
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import code_counts
from isic_vq.evaluation.report import Metric
from isic_vq.evaluation.report_tables import markdown_table
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import BLOCK_SIZE, IsicVQModel
from isic_vq.models.vector_quantizer import usage_and_perplexity
from measure import Difference, flops_per_image, measure_chain, paired_difference
from page import SMOKE, StudyPage, over_seeds, recipe_table
from smoke import smoke_recipe

DATA = "validation"
PER_IMAGE = {"psnr": "dB", "ssim": "1", "bits_per_code": "bits per code", "coded_bytes": "bytes per image"}
QUESTION = (
    "Images are quantized more finely by more codes or by a finer grid of them. Too coarse loses detail, too fine costs: more bytes per "
    "image, and a prior that has more to learn and to draw. Tokenizers of each codebook size on each grid, and a prior for each, are "
    "trained alike with each seed and measured on images that none of them saw. `coded bytes` is what an ideal entropy coder driven by "
    "the prior takes (without a class), `flat` what codes take as they are."
)


UNITS = {
    "flat_bytes": "bytes per image",
    "training_flops": "floating-point operations",
    "sampling_flops": "floating-point operations per image",
}
COLUMNS = {  # of the table of models: what is shown, by how much it is divided, with how many digits
    "PSNR, dB": ("psnr", 1.0, 2),
    "SSIM": ("ssim", 1.0, 3),
    "perplexity": ("perplexity", 1.0, 0),
    "bits per code": ("bits_per_code", 1.0, 2),
    "coded bytes": ("coded_bytes", 1.0, 0),
    "unigram bytes": ("unigram_bytes", 1.0, 0),
    "flat bytes": ("flat_bytes", 1.0, 0),
    "TFLOP to train": ("training_flops", 1e12, 1),
    "GFLOP per sample": ("sampling_flops", 1e9, 2),
    "s per sample": ("sampling_seconds", 1.0, 3),
}


@dataclass(frozen=True)
class Measured:
    """One model of the study.

    Attributes:
        values: `(N,)` float64 of every image, by name as in `PER_IMAGE`, and `unigram_bytes`; `sampling_seconds`, per image
            of drawing and decoding a block of `BLOCK_SIZE` images, of several runs.
        numbers: `perplexity`, `flat_bytes` and operations, by name.
        code_counts: `(N, K)`, uses of each code by each image.
    """

    chain: Chain
    values: dict[str, Tensor]
    numbers: dict[str, float]
    code_counts: Tensor

    def mean(self, name: str) -> float:
        """The mean of values, or a number."""
        return self.values[name].mean().item() if name in self.values else self.numbers[name]


Groups = dict[str, list[Measured]]  # the models of each setting, one per seed, by its label


def key(grid: str, num_codes: int) -> str:
    """The label of a setting."""
    return ", ".join(labels(grid, num_codes).values())


def by_setting(measured: list[Measured]) -> Groups:
    """The models of each setting, one per seed."""
    groups: Groups = {}
    for model in measured:
        groups.setdefault(model.chain.label, []).append(model)
    return groups


def measure_model(chain: Chain, uri: str) -> Measured:
    """Measure a finished model of the study on images; reconstruction and likelihood are measured once and kept."""
    kept = measure_chain(chain, DATA, uri)
    model = load_model(IsicVQModel, str(chain.model)).eval()
    config = model.config.vqvae_config
    values = {name: kept[name].double() for name in ("psnr", "ssim", "bits_per_code")}
    values["coded_bytes"] = values["bits_per_code"] * config.num_positions / 8
    train, held_out = (read_code_cache(chain.folder / f"{name}.parquet") for name in ("train", "validation"))
    codes = held_out.first_views()
    values["unigram_bytes"] = unigram_bits(train.counts(), codes).flatten(1).sum(1) / 8
    draw = partial(model.generate, BLOCK_SIZE, seed=0)
    values["sampling_seconds"] = seconds(draw, model.device) / BLOCK_SIZE
    _, perplexity = usage_and_perplexity(kept["codebook_counts"])
    flops = flops_per_image(model)
    loops = {"tokenizer": chain.vqvae["loop"], "prior": chain.prior["loop"]}
    # A step back costs twice a step forward: the gradients of inputs and of weights.
    training = sum(3 * flops[part] * loop["max_steps"] * loop["batch_size"] for part, loop in loops.items())
    numbers = {
        "perplexity": perplexity,
        "flat_bytes": config.num_positions * math.log2(config.num_codes) / 8,
        "training_flops": float(training),
        "sampling_flops": float(flops["prior"] + flops["decoder"]),
    }
    return Measured(chain, values, numbers, code_counts(codes, config.num_codes))


def granularity_page(recipe: GranularityRecipe, smoke: bool = False) -> StudyPage:
    """Measure all models of a study, which are trained, and say what was found."""
    measured = [measure_model(chain, recipe.validation) for chain in chains(recipe)]
    on, groups = MeasuredOn(DATA, find_source(recipe.validation).name), by_setting(measured)
    page = StudyPage("granularity", "How fine should images be quantized?", QUESTION, smoke=smoke)
    for model in measured:
        page.metrics += model_metrics(model, on)
    page.tables = [
        ("Models", models_table(groups)),
        ("How they were trained", recipe_table(recipe.vqvae, recipe.prior)),
    ]
    page.figures = figures(groups, recipe, SMOKE if smoke else None)
    page.findings = findings(groups, recipe)
    page.differences = differences(groups)
    return page


def model_metrics(measured: Measured, on: MeasuredOn) -> list[Metric]:
    """The report's lines for one model; the seed is that of its training."""
    seed, of = measured.chain.seed, measured.chain.labels
    means = {**PER_IMAGE, "unigram_bytes": "bytes per image"}
    used = codebook_metrics(measured.code_counts, on, 0, **of)
    return [
        *(on.mean(name, measured.values[name], unit, seed, **of) for name, unit in means.items()),
        *(dataclasses.replace(metric, seed=seed) for metric in used),
        *(
            MODEL.metric(name, measured.numbers[name], unit, 1, seed, None, **of)
            for name, unit in UNITS.items()
        ),
        MODEL.mean("sampling_seconds", measured.values["sampling_seconds"], "s per image", seed, **of),
    ]


def models_table(groups: Groups) -> str:
    """A row per setting: means over seeds, each seed in brackets unless all are alike."""
    rows = []
    for label, models in groups.items():
        cells = []
        for name, divisor, digits in COLUMNS.values():
            each = [model.mean(name) / divisor for model in models]
            cells.append(f"{each[0]:.{digits}f}" if name in UNITS else over_seeds(each, digits))
        rows.append([label.removesuffix(" codes"), *cells])
    return markdown_table(["grid, codes", *COLUMNS], rows)


def figures(groups: Groups, recipe: GranularityRecipe, mark: str | None) -> list[tuple[str, str, bytes]]:
    """Curves over the codebook size, and of quality over bytes."""
    from isic_vq.figures.plots import Curve, curves, png_bytes

    def each_seed(name: str, grid: str) -> list[list[float]]:
        return [[model.mean(name) for model in groups[key(grid, k)]] for k in recipe.num_codes]

    def panel(title: str, unit: str, name: str, over: str | None = None) -> tuple[str, str, list[Curve]]:
        drawn = []
        for grid in recipe.grids:
            each = each_seed(name, grid)
            x = recipe.num_codes if over is None else list(map(fmean, each_seed(over, grid)))
            drawn.append(Curve(grid, x, list(map(fmean, each)), list(zip(*each, strict=True))))
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
    largest = max(model.mean("coded_bytes") for models in groups.values() for model in models)
    ticks = [2**power for power in range(5, 14) if 2**power < 1.3 * largest]
    rate_panel = panel("rate and distortion", "PSNR in dB", "psnr", "coded_bytes")
    rate = curves([rate_panel], "coded bytes per image", ticks, mark)
    about_codes = "By codebook size: lines are means over seeds, dots are seeds."
    about_rate = "Quality over storage: each line runs from few to many codes."
    return [
        ("over-codebook-size", about_codes, png_bytes(over_codes)),
        ("rate-distortion", about_rate, png_bytes(rate)),
    ]


def findings(groups: Groups, recipe: GranularityRecipe) -> list[str]:
    """Sentences on neighbouring settings, each only as strong as all seeds allow."""
    sizes = sorted(recipe.num_codes)
    steps = [
        (f"On {grid}, from {fewer} to {more} codes:", key(grid, fewer), key(grid, more))
        for grid in recipe.grids
        for fewer, more in itertools.pairwise(sizes)
    ] + [
        (f"With {k} codes, from {coarse} to {fine}:", key(coarse, k), key(fine, k))
        for coarse, fine in itertools.pairwise(recipe.grids)
        for k in recipe.num_codes
    ]
    compared = []
    for about, first, second in steps:
        operations = groups[second][0].mean("sampling_flops") / groups[first][0].mean("sampling_flops")
        changes = "; ".join(gain_and_cost(groups[first], groups[second]))
        compared.append(f"{about} {changes}; drawing an image takes {operations:.1f} times the operations.")
    return [*compared, *dominated(groups), *returns(groups, recipe)]


def gain_and_cost(first: list[Measured], second: list[Measured]) -> tuple[str, str]:
    """How quality and coded size change from the first setting to the second, in words."""
    quality, size = (difference(first, second, name) for name in ("psnr", "coded_bytes"))
    return quality.change("PSNR", "dB", 2), size.change("the coded size", "bytes", 0)


def difference(first: list[Measured], second: list[Measured], name: str) -> Difference:
    """Second minus first, image by image, seed by seed."""
    return paired_difference([m.values[name] for m in first], [m.values[name] for m in second])


def differences(groups: Groups) -> dict[str, Difference]:
    """Every two settings' difference in quality and bytes, by name such as "psnr[f8, 64 codes -> f4, 64 codes]"."""
    return {
        f"{name}[{first} -> {second}]": difference(groups[first], groups[second], name)
        for first, second in itertools.combinations(groups, 2)
        for name in ("psnr", "coded_bytes")
    }


def dominated(groups: Groups) -> list[str]:
    """Settings that another one beats in quality and bytes at once, in every seed."""
    beaten = []
    for (label, models), (other, rivals) in itertools.permutations(groups.items(), 2):
        quality, size = (difference(models, rivals, name) for name in ("psnr", "coded_bytes"))
        if quality.sign > 0 and size.sign < 0:
            worse, better = (
                label.replace(", ", " with "),
                other.replace(", ", " with ").removesuffix(" codes"),
            )
            beaten.append(f"{worse} is beaten by {better}: {' and '.join(gain_and_cost(models, rivals))}.")
    return beaten or ["No setting is beaten by another in quality and bytes at once."]


def returns(groups: Groups, recipe: GranularityRecipe) -> list[str]:
    """Where a step to more codes buys less quality per byte than the step before it did, by the intervals of all seeds."""
    dearer = []
    sizes = sorted(recipe.num_codes)
    for grid in recipe.grids:
        for steps in zip(sizes, sizes[1:], sizes[2:], strict=False):
            models = [groups[key(grid, k)] for k in steps]
            gains, costs = (
                [difference(*pair, name) for pair in itertools.pairwise(models)]
                for name in ("psnr", "coded_bytes")
            )
            if gains[0].sign <= 0 or any(cost.sign <= 0 for cost in costs):
                continue
            at_least = [low / c for (low, _), c in zip(gains[0].intervals, costs[0].means, strict=True)]
            at_most = [high / c for (_, high), c in zip(gains[1].intervals, costs[1].means, strict=True)]
            if all(later < earlier for earlier, later in zip(at_least, at_most, strict=True)):
                bought = [1000 * gain.mean / cost.mean for gain, cost in zip(gains, costs, strict=True)]
                dearer.append(
                    f"On {grid} detail gets dearer: a byte buys {bought[0]:.1f} thousandths of a dB from {steps[0]} to {steps[1]} "
                    f"codes and {bought[1]:.1f} from {steps[1]} to {steps[2]}."
                )
    return dearer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    description = "Compare codebook sizes and grids by quality and cost."
    run_study(GranularityRecipe, smoke_recipe, chains, granularity_page, description, arguments)


if __name__ == "__main__":
    main()
