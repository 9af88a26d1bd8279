"""A study made so small that it runs in minutes: to see that it runs, not what it finds."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from chain import StudyRecipe
from isic_vq.data.shards import write_records
from isic_vq.data.sources import open_source

Recipe = TypeVar("Recipe", bound=StudyRecipe)

IMAGES = 32  # of each source
LOOP = {"max_steps": 6, "batch_size": 8, "warmup_steps": 2, "save_every": 3}
CODEBOOK_WARMUP_STEPS = 2


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The same study with few steps on few images, in a folder of its own, where the images are written.

    Raises:
        DataError: images cannot be read.
    """
    folder = Path(f"{recipe.output_dir}-smoke")
    changes: dict[str, Any] = {
        "output_dir": str(folder),
        "train": few(recipe.train, folder / "smoke" / "train.parquet"),
        "validation": few(recipe.validation, folder / "smoke" / "validation.parquet"),
        "vqvae": shortened({**recipe.vqvae, "codebook_warmup_steps": CODEBOOK_WARMUP_STEPS}),
        "prior": shortened(recipe.prior),
    }
    return dataclasses.replace(recipe, **changes)


def shortened(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's recipe with few steps."""
    return {**stage, "loop": {**stage.get("loop", {}), **LOOP}}


def few(uri: str, path: Path) -> str:
    """Write the first `IMAGES` of each source as parquet, unless they are there; the file's URI."""
    if not path.is_file():
        records, seen, rows = open_source(uri), Counter[str | None](), []
        for row, source in enumerate(records["source"]):
            seen[source] += 1
            if seen[source] <= IMAGES:
                rows.append(row)
        write_records(records.select(rows), path)
    return f"parquet:{path}"
