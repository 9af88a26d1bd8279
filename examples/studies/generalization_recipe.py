"""How much worse does a model do on images of another source, and what does augmentation buy?

Tokenizers and priors trained on the images of some clinics alone, with and without dihedral augmentation, with more
than one seed, and measured on held-out images of every clinic and on other data sets. Source of the question: the
report "Image Generation using VQ-VAE and Pixel CNN", which expects less quality on other sources and augmentation to
help.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.dataclasses import strict

from chain import Chain, StudyRecipe
from isic_vq.data.augmentation import NUM_VIEWS
from isic_vq.data.order import seeded_subset
from isic_vq.data.schema import DataError
from isic_vq.data.shards import write_records
from isic_vq.data.sources import open_source
from isic_vq.training.load import build_recipe

PARTS = ("train", "validation")


@strict
@dataclass
class Domain:
    """Images of some sources.

    Args:
        sources: patterns of the records' `source`, such as "vidir_*".
        num_images: train on a seeded subset of so many; None takes all. It makes domains of different sizes
            comparable.
    """

    sources: list[str] = field(default_factory=lambda: ["*"])
    num_images: int | None = None


@strict
@dataclass
class GeneralizationRecipe(StudyRecipe):
    """A generalization study.

    Args:
        domains: by name, fields of `Domain`; a model is trained on each, from the training images.
        tests: by name, URIs of images that are only tested on.
    """

    output_dir: str = "runs/generalization"
    stage: str = "generalization"
    domains: dict = field(default_factory=dict)
    tests: dict = field(default_factory=dict)

    def validate_domains(self) -> None:
        """Check the domains; called by `strict`."""
        if not self.domains:
            raise ValueError("domains is empty: name at least one, such as {all: {sources: ['*']}}")
        for name, fields in self.domains.items():
            build_recipe(Domain, fields, prefix=f"domains.{name}.")


def labels(domain: str, augment: bool) -> dict[str, str]:
    """What tells a model of the study from others, but for the seed."""
    return {"domain": domain, "augmentation": "augmented" if augment else "plain"}


def chains(recipe: GeneralizationRecipe) -> Iterator[Chain]:
    """The models of a study; all settings with the first seed come before any with the second."""
    for seed in recipe.seeds:
        for domain in recipe.domains:
            for augment in (False, True):
                named = labels(domain, augment)
                yield Chain(
                    Path(recipe.output_dir, f"{'-'.join(named.values())}-seed{seed}"),
                    f"parquet:{domain_file(recipe, domain, 'train')}",
                    f"parquet:{domain_file(recipe, domain, 'validation')}",
                    seed,
                    {**recipe.vqvae, "augment": augment},
                    recipe.prior,
                    views=NUM_VIEWS if augment else 1,
                    labels=named,
                )


def domain_file(recipe: GeneralizationRecipe, domain: str, part: str) -> Path:
    """Where a domain's images of a part lie."""
    return Path(recipe.output_dir, "images", f"{domain}-{part}.parquet")


def write_domains(recipe: GeneralizationRecipe) -> None:
    """Write the images of every domain and part to a file each, unless it is there.

    Raises:
        DataError: a domain has no image, or fewer than it asks for.
    """
    for part, uri in zip(PARTS, (recipe.train, recipe.validation), strict=True):
        for name, fields in recipe.domains.items():
            path, domain = domain_file(recipe, name, part), build_recipe(Domain, fields)
            if path.is_file():
                continue
            records = open_source(uri)
            rows = [
                row
                for row, source in enumerate(records["source"])
                if any(fnmatch.fnmatch(source or "", pattern) for pattern in domain.sources)
            ]
            wanted = domain.num_images if part == "train" and domain.num_images is not None else len(rows)
            if not 0 < wanted <= len(rows):
                raise DataError(
                    f"domain {name} has {len(rows)} images of {part} and wants {wanted or 'at least one'}: "
                    "change its sources or its num_images"
                )
            chosen = sorted(rows[index] for index in seeded_subset(len(rows), wanted, seed=0).tolist())
            write_records(records.select(chosen), path)
