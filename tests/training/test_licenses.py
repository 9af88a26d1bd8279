"""Training on images under some licences alone, and what the weights then say of themselves."""

import csv
import json

import pytest

from isic_vq.data.code_cache import read_code_cache
from isic_vq.data.sources import describe_source
from isic_vq.data.sources.base import hash_ids
from isic_vq.training.load import load_recipe
from isic_vq.training.processes import TrainingError
from isic_vq.training.recipe import VQVAERecipe
from isic_vq.training.vqvae import train_vqvae

LICENSES = ("CC-0", "CC-BY-NC")


@pytest.fixture
def mixed_folder(image_folder):
    """Sixteen images, every other one under CC-0."""
    path = image_folder / "metadata.csv"
    with path.open(newline="") as file:
        rows = [{**row, "license": LICENSES[i % 2]} for i, row in enumerate(csv.DictReader(file))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return image_folder


def recipe_of(tiny_run, folder, run_dir, *overrides):
    data = [f"data.train=folder:{folder}", "data.validation=null", "data.validation_share=0.4"]
    return load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], [*data, f"output_dir={run_dir}", *overrides])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tokenizer_learns_from_images_under_the_licence_alone(tiny_run, mixed_folder, tmp_path, streamed):
    overrides = ["data.licenses=[CC0]"]
    if streamed:
        validation = tiny_run.images["validation"]
        overrides += ["data.stream=true", f"data.validation=folder:{validation}"]
    train_vqvae(recipe_of(tiny_run, mixed_folder, tmp_path / "run", *overrides))
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert data["train"]["licenses"] == {"CC-0": data["train"]["num_images"]}
    ids = [f"SYNTHETIC_0_{index:07d}" for index in range(0, 16, 2)]
    if streamed:
        assert data["train"]["ids_sha256"] == hash_ids(ids)
        assert data["validation"]["licenses"] == {"CC0-1.0": 16}, (
            "images that are named are taken as they are"
        )
    else:
        assert data["validation"]["licenses"] == {"CC-0": len(ids) - data["train"]["num_images"]}
    beside = json.loads((tmp_path / "run" / "model" / "training_data.json").read_text())
    assert beside == {"vqvae": data["train"]}


def test_a_run_is_not_resumed_on_images_under_other_licences(tiny_run, mixed_folder, tmp_path):
    train_vqvae(recipe_of(tiny_run, mixed_folder, tmp_path / "run", "data.licenses=[CC-0]"))
    with pytest.raises(TrainingError, match=r"begun with data.licenses = \[.CC-0.\]"):
        train_vqvae(recipe_of(tiny_run, mixed_folder, tmp_path / "run"), resume=True)


def test_encode_takes_images_under_the_licence_alone(run, tiny_run, mixed_folder, tmp_path):
    uri, output = f"folder:{mixed_folder}", tmp_path / "codes.parquet"
    code, _, stderr = run(
        *("encode", tiny_run.vqvae / "model", "--data", uri, "--license", "CC-0", "-o", output)
    )
    assert code == 0, stderr
    cache = read_code_cache(output)
    assert cache.isic_ids == [f"SYNTHETIC_0_{index:07d}" for index in range(0, 16, 2)]
    assert cache.source.licenses == {"CC-0": 8}
    assert cache.source.name == "folder:images (licence CC-0)"
    assert cache.source.ids_sha256 == hash_ids(cache.isic_ids) != describe_source(uri).ids_sha256
