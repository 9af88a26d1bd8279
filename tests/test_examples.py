"""The scripts in examples/ run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from isic_vq import IsicVQModel
from isic_vq.data.synthetic_images import synthetic_image

ROOT = Path(__file__).resolve().parents[1]


def run(arguments: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture
def workplace(tmp_path):
    """A folder with two images."""
    for index, name in enumerate(("image.jpg", "other.jpg")):
        synthetic_image(index, seed=0).save(tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_example_generate_writes_its_picture(workplace):
    run([str(ROOT / "examples" / "generate.py"), "--per-class", "1"], workplace)
    assert picture_size(workplace / "diagnoses.png")[1] > 128


@pytest.mark.slow
def test_example_code_swap_writes_its_picture(workplace):
    run([str(ROOT / "examples" / "code_swap.py"), "image.jpg", "other.jpg"], workplace)
    assert picture_size(workplace / "swapped.png")[0] > 4 * 128


@pytest.mark.slow
def test_example_counterfactual_writes_its_picture(workplace):
    options = ["--diagnoses", "nevus", "mel", "--particles", "4"]
    run([str(ROOT / "examples" / "counterfactual.py"), "image.jpg", *options], workplace)
    assert picture_size(workplace / "counterfactuals.png")[0] > 3 * 128


@pytest.mark.slow
def test_example_train_with_trainer_makes_a_model_that_generates(tmp_path):
    for index in range(10):
        folder = tmp_path / "images" / ("nevus" if index % 2 else "melanoma")
        folder.mkdir(parents=True, exist_ok=True)
        synthetic_image(index, seed=0, size=32).save(folder / f"{index}.png")
    script = ROOT / "examples" / "train_with_trainer.py"
    assert len(script.read_text().splitlines()) < 60
    run([str(script), "images", "--output", "model", "--size", "32", "--epochs", "2"], tmp_path)
    model = IsicVQModel.from_pretrained(tmp_path / "model")
    assert model.config.class_names == {0: "melanoma", 1: "nevus"}
    assert model.generate(2, "nevus", seed=0).pixel_values.shape == (2, 3, 32, 32)
