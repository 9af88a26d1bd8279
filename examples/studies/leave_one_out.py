"""Train a generator that never saw one collection: `python examples/studies/leave_one_out.py examples/configs/leave-one-out.yaml`.

Writes the images of all other collections and those of the one that is left out, and trains a tokenizer and its prior on the
others. What the generator is worth where it never was is then `isic-vq evaluate --only utility`, see docs/utility.md. The
control that saw some of it: `generator_sees_site=true output_dir=runs/site-seen`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub.dataclasses import strict

from chain import Chain, StudyRecipe
from command import errors_in_one_line
from isic_vq.data.augmentation import NUM_VIEWS
from isic_vq.data.order import stratified_subset
from isic_vq.data.schema import DataError
from isic_vq.data.shards import write_records
from isic_vq.data.sources import open_source
from isic_vq.training.load import load_recipe
from isic_vq.work import begin


@strict
@dataclass
class LeaveOneOutRecipe(StudyRecipe):
    """A generator without one collection.

    Args:
        left_out: `source` of the records that the generator does not see.
        site_images: of the left-out images, those that a classifier may be trained on: a random part, stratified by
            diagnosis; the others test it.
        generator_sees_site: add those images to what the generator is trained on: a control that tells what a generator lacks
            because it never saw the collection from what it lacks because it is small.
    """

    output_dir: str = "runs/leave-one-out"
    stage: str = "leave-one-out"
    left_out: str = "rosendahl"
    site_images: int = 500
    generator_sees_site: bool = False


def write_images(recipe: LeaveOneOutRecipe) -> dict[str, Path]:
    """Write `train` and `validation` images of the others and `site` and `test` images of the left-out collection; files that are there stay.

    Raises:
        ValueError: the folder was begun with other images.
        DataError: the collection has too few images.
    """
    from datasets import concatenate_datasets

    paths = {
        part: Path(recipe.output_dir, "images", f"{part}.parquet")
        for part in ("train", "validation", "site", "test")
    }
    settings = ("train", "validation", "left_out", "site_images", "generator_sees_site")
    begin(Path(recipe.output_dir), {name: getattr(recipe, name) for name in settings})
    if all(path.is_file() for path in paths.values()):
        return paths
    others, own = {}, []
    for part, uri in (("train", recipe.train), ("validation", recipe.validation)):
        every = open_source(uri)
        mine = np.array([source == recipe.left_out for source in every["source"]])
        own.append(every.select(np.flatnonzero(mine)))
        others[part] = every.select(np.flatnonzero(~mine))
    left_out = concatenate_datasets(own)
    if not 0 < recipe.site_images < len(left_out):
        raise DataError(f"{recipe.left_out} has {len(left_out)} images: site_images is {recipe.site_images}")
    chosen = stratified_subset(left_out["diagnosis"], recipe.site_images, seed=0)
    site = left_out.select(chosen)
    if recipe.generator_sees_site:
        others["train"] = concatenate_datasets([others["train"], site])
    test = left_out.select(np.setdiff1d(np.arange(len(left_out)), chosen))
    for part, records in {**others, "site": site, "test": test}.items():
        write_records(records, paths[part])
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the images and train the generator; a killed run resumes by the same command."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    options = parser.parse_args(arguments)
    with errors_in_one_line():
        recipe = load_recipe(LeaveOneOutRecipe, options.config, options.overrides)
        paths = write_images(recipe)
        chain = Chain(
            Path(recipe.output_dir, "generator"),
            f"parquet:{paths['train']}",
            f"parquet:{paths['validation']}",
            recipe.seeds[0],
            recipe.vqvae,
            recipe.prior,
            views=NUM_VIEWS,
        )
        if not chain.is_finished:
            chain.run()
        print(f"the generator is {chain.model}")


if __name__ == "__main__":
    main()
