"""A study's models, tiny."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory):
    """URIs of a training and a validation folder, 12 and 10 images of each of two sources: dark and bright ones."""
    folder, uris = tmp_path_factory.mktemp("sources"), {}
    for seed, (part, number) in enumerate({"train": 12, "validation": 10}.items()):
        generator = np.random.default_rng(seed)
        (folder / part).mkdir()
        lines = ["file_name,isic_id,diagnosis,source"]
        for source, level in (("north_a", 60), ("south", 180)):
            for index in range(number):
                name = f"{source}{index}"
                pixels = level + generator.integers(-40, 41, (16, 16, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"{name}.png")
                lines.append(f"{name}.png,ISIC_{part}_{name},nevus,{source}")
        (folder / part / "metadata.csv").write_text("\n".join(lines) + "\n")
        uris[part] = f"folder:{folder / part}"
    return uris
