"""The command line of a study: `python STUDY.py CONFIG [KEY=VALUE ...] [--smoke] [--out FOLDER]`."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging as transformers_logging

from chain import Chain, StudyRecipe
from isic_vq.allocator import keep_freed_memory
from isic_vq.figures.write import check_matplotlib
from isic_vq.training.load import load_recipe
from page import StudyPage, check_folder

Recipe = TypeVar("Recipe", bound=StudyRecipe)


def run_study(
    recipe_class: type[Recipe],
    shorten: Callable[[Recipe], Recipe],
    open_chains: Callable[[Recipe], Iterable[Chain]],
    measure: Callable[[Recipe, bool], StudyPage],
    description: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """Train the models of a study that are not trained yet, measure them and write the page.

    Args:
        recipe_class: of the study's recipe.
        shorten: makes a recipe that runs in minutes, for `--smoke`.
        open_chains: the models of the study.
        measure: the page, from the recipe and whether it is a smoke run.
        description: of the study, for `--help`.
        arguments: of the command line; by default `sys.argv`.
    """
    parser = argparse.ArgumentParser(
        description=f"{description} A killed run resumes by the same command.",
    )
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="few steps on few images, to see that it runs; marked so everywhere",
    )
    parser.add_argument(
        "-o", "--out", type=Path, help="folder of the results; default: results in the recipe's output_dir"
    )
    options = parser.parse_args(arguments)
    with errors_in_one_line():
        check_matplotlib()
        recipe = load_recipe(recipe_class, options.config, options.overrides)
        if options.smoke:
            recipe = shorten(recipe)
        folder = options.out or Path(recipe.output_dir, "results")
        check_folder(folder, options.smoke)  # before anything is trained
        chains = list(open_chains(recipe))
        for number, chain in enumerate(chains, 1):
            if not chain.is_finished:
                print(f"model {number} of {len(chains)}: {chain.folder.name}")
                chain.run()
        page = measure(recipe, options.smoke)
        for path in page.write(folder):
            print(f"wrote {path}")
        for finding in page.findings:
            print(f"- {finding}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Set up messages as the command line of isic-vq does, and end on an error or Ctrl-C with one line."""
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("isic_vq").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        sys.exit(130)
