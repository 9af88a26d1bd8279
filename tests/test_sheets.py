"""Sheets of a model: every picture is there, of the right size, of the images it says, and says what it is."""

import numpy as np
import pytest
from PIL import Image

from isic_vq.figures.sheets import (
    COLUMNS,
    NUM_PER_CLASS,
    NUM_UNCONDITIONAL,
    ROWS,
    interpolation_sheet,
    model_sheets,
)
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

PANELS = ["interpolation", "completion", "counterfactual", "atlas"]


@pytest.fixture(scope="module", params=["tiny_run", "var_run"])
def model(request):
    return load_model(IsicVQModel, str(request.getfixturevalue(request.param).prior / "model")).eval()


@pytest.fixture(scope="module")
def sheets(model):
    return {sheet.name: sheet for sheet in model_sheets(model, seed=5, particles=2)}


def cell(picture, row, column, size=16, padding=2):
    """The pixels of one image of a sheet without labels."""
    top, left = (padding + index * (size + padding) for index in (row, column))
    return np.asarray(picture)[top : top + size, left : left + size]


def pixels(images):
    return IsicVQImageProcessor().postprocess(images, output_type="np")


def test_there_is_a_sheet_of_everything(model, sheets):
    classes = list(model.config.class_names.values())
    assert list(sheets) == ["unconditional", *classes, *PANELS]
    for name in ("unconditional", *classes):
        number = NUM_PER_CLASS if name in classes else NUM_UNCONDITIONAL
        rows = number // COLUMNS
        assert sheets[name].picture.size == (2 + COLUMNS * 18, 2 + rows * 18)
        assert f"{number} images, seed 5, not selected" in sheets[name].caption


def test_images_are_those_that_the_model_generates_of_the_seed(model, sheets):
    name = next(iter(model.config.class_names.values()))
    for label, number in ((None, NUM_UNCONDITIONAL), (name, NUM_PER_CLASS)):
        images = pixels(model.generate(number, label, seed=5).pixel_values)
        picture = sheets[label or "unconditional"].picture
        for index in (0, COLUMNS + 1, number - 1):
            assert np.array_equal(cell(picture, *divmod(index, COLUMNS)), images[index])


def test_mixtures_begin_and_end_with_generated_images(model):
    picture = interpolation_sheet(model, 5).picture
    images = pixels(model.generate(2 * ROWS, seed=5).pixel_values).astype(int)
    for row in range(ROWS):
        for column, index in ((0, row), (COLUMNS - 1, ROWS + row)):
            difference = cell(picture, row, column).astype(int) - images[index]
            assert abs(difference).max() <= 1, "one rounding in the mixture"


def test_completions_keep_the_left_half_of_the_codes(model, sheets):
    picture = sheets["completion"].picture
    image, kept = cell(picture, 0, 0), cell(picture, 0, 1)
    assert np.array_equal(image[:, :8], kept[:, :8])
    assert (kept[:, 8:] == kept[0, 8]).all()
    variants = [cell(picture, 0, column) for column in range(2, COLUMNS)]
    assert len({variant.tobytes() for variant in variants}) > 1


def test_the_atlas_has_a_tile_for_each_code_the_brightest_first(model, sheets):
    config = model.config.vqvae_config
    tile = 2 * config.downsampling
    assert config.num_codes <= 32, "one row"
    tiles = [cell(sheets["atlas"].picture, 0, index, tile).mean() for index in range(config.num_codes)]
    assert all(first >= second - 1 for first, second in zip(tiles, tiles[1:], strict=False))


def test_the_command_writes_jpegs_that_say_what_they_are(run, tiny_run, tmp_path):
    code, out, err = run(
        *("evaluate", tiny_run.prior / "model", "--only", "sheets"),
        *("-o", tmp_path / "sheets", "--particles", 2),
    )
    assert code == 0, err
    written = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert {"unconditional.jpg", *(f"{name}.jpg" for name in PANELS)} <= set(written)
    with Image.open(tmp_path / "sheets" / "atlas.jpg") as image:
        assert image.info["comment"].startswith(b"what each code draws")
        assert b"isic-vq" in image.info["comment"]
    assert "counterfactual.jpg" in out


def test_real_images_stand_above_generated_ones_of_the_same_diagnosis(run, tiny_run, tmp_path):
    code, _, err = run(
        *(
            "evaluate",
            tiny_run.prior / "model",
            "--only",
            "sheets",
            "--data",
            f"folder:{tiny_run.images['validation']}",
        ),
        *("-o", tmp_path),
    )
    assert code == 0, err
    model = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    assert sorted(tmp_path.iterdir()) == sorted(
        tmp_path / f"real-{name}.jpg" for name in model.config.class_names.values()
    )
