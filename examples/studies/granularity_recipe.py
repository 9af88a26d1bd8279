"""How fine should images be quantized? Too coarse loses detail, too fine costs: both sides, measured.

Tokenizers of several codebook sizes on two grids, and a prior for each, trained alike with more than one seed. Source
of the question: the report "Image Generation using VQ-VAE and Pixel CNN", which asks it and does not measure it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.dataclasses import strict

from chain import Chain, StudyRecipe
from isic_vq.models.configuration_vqvae import PRESETS


@strict
@dataclass
class GranularityRecipe(StudyRecipe):
    """A granularity study.

    Args:
        grids: by name, what of a tokenizer's config sets its grid, such as `hidden_sizes`.
        num_codes: codebook sizes.
    """

    output_dir: str = "runs/granularity"
    stage: str = "granularity"
    grids: dict = field(default_factory=lambda: dict(PRESETS))
    num_codes: list[int] = field(default_factory=lambda: [64, 256, 1024])


def labels(grid: str, num_codes: int) -> dict[str, str]:
    """What tells a model of the study from others, but for the seed."""
    return {"grid": grid, "codebook": f"{num_codes} codes"}


def chains(recipe: GranularityRecipe) -> Iterator[Chain]:
    """The models of a study; all settings with the first seed come before any with the second."""
    for seed in recipe.seeds:
        for grid, fields in recipe.grids.items():
            for num_codes in recipe.num_codes:
                model = {**recipe.vqvae.get("model", {}), **fields, "num_codes": num_codes}
                yield Chain(
                    Path(recipe.output_dir, f"{grid}-{num_codes}-seed{seed}"),
                    recipe.train,
                    recipe.validation,
                    seed,
                    {**recipe.vqvae, "model": model},
                    recipe.prior,
                    labels=labels(grid, num_codes),
                )
