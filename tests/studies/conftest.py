"""A study's models, tiny."""

import numpy as np
import pytest
import torch
from coloured_images import COLOURS, write_coloured
from PIL import Image

from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.modeling_isic_vq import IsicVQModel


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


@pytest.fixture(scope="session")
def coloured_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    train = write_coloured(folder / "train", dict.fromkeys(COLOURS, 12), seed=0)
    test = write_coloured(folder / "test", {"melanoma": 14, "nevus": 16, "vascular_lesion": 5}, seed=1)
    return train, test


@pytest.fixture(scope="session")
def noise_generator():
    """An untrained model: its images are noise that has nothing to do with their diagnosis."""
    torch.manual_seed(0)
    vqvae = {
        "image_size": 16,
        "hidden_sizes": (8, 8),
        "num_codes": 8,
        "code_dim": 4,
        "residual_size": 4,
        "num_residual_blocks": 1,
    }
    prior = {
        "num_codes": 8,
        "grid_size": 4,
        "hidden_size": 8,
        "num_layers": 1,
        "head_size": 8,
        "id2label": dict(enumerate(COLOURS)),
    }
    return IsicVQModel(IsicVQConfig(vqvae_config=vqvae, prior_config=prior)).eval()
