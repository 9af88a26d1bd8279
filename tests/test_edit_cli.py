"""`isic-vq edit` on a tiny model: what it writes, what it says, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from isic_vq import __version__
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

WIDTH, HEIGHT = (
    48,
    32,
)  # the centred square of the picture starts at x = 8; half of it goes to each pixel of 16


@pytest.fixture
def edit(run, tiny_run, picture, tmp_path):
    """Run the command; returns exit code, stdout and stderr."""

    def invoke(*options, image=picture):
        return run("edit", image, "-m", tiny_run.prior / "model", "-o", tmp_path / "out", *options)

    return invoke


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def written(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "out").glob("*.png"))}


def changed(folder, picture, name="image-00000.png"):
    """Pixels of the square that differ from the original's."""
    return (written(folder)[name] != IsicVQImageProcessor(size=16).to_square(picture)).any(-1)


def test_edit_writes_variants_a_grid_and_what_they_are(edit, tmp_path, picture):
    code, stdout, stderr = edit("--box", "20,8,28,16", "-n", 3, "-l", "mel", "--seed", 4, "--particles", 8)
    assert code == 0, stderr
    lines = stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["variant 0", "variant 1", "variant 2"]
    assert all("of 8 particles" in line for line in lines[:3])
    assert lines[3:] == [f"wrote 3 variants and {tmp_path / 'out' / 'grid.png'}"]
    assert set(written(tmp_path)) == {"grid.png", *(f"image-0000{index}.png" for index in range(3))}
    image = Image.open(tmp_path / "out" / "image-00001.png")
    assert (image.size, image.mode) == ((16, 16), "RGB")
    assert image.text == {
        "Software": f"isic-vq {__version__}",
        "Title": "melanoma",
        "Source": "model",
        "Comment": "edited image, seed 4, index 1",
    }


def test_edit_draws_what_the_library_draws(edit, tiny_run, tmp_path, picture):
    assert edit("--box", "20,8,28,16", "-n", 2, "-l", "nevus", "--seed", 4, "--particles", 8)[0] == 0
    model, processor = load_model(IsicVQModel, str(tiny_run.prior / "model")), IsicVQImageProcessor(size=16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8, 6:10] = True
    original = processor(picture, return_tensors="pt")["pixel_values"]
    for index in range(2):
        expected = model.inpaint(original, mask, "nevus", num_particles=8, seed=4, first_index=index)
        pixels = processor.postprocess(expected.pixel_values, output_type="np")[0]
        np.testing.assert_array_equal(written(tmp_path)[f"image-0000{index}.png"], pixels)


def test_paste_leaves_the_patches_as_they_are_decoded(edit, tiny_run, tmp_path, picture):
    assert edit("--box", "20,8,28,16", "-n", 1, "--seed", 4, "--particles", 8, "--blend", "paste")[0] == 0
    model, processor = load_model(IsicVQModel, str(tiny_run.prior / "model")), IsicVQImageProcessor(size=16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8, 6:10] = True
    original = processor(picture, return_tensors="pt")["pixel_values"]
    expected, blended = (
        processor.postprocess(
            model.inpaint(original, mask, num_particles=8, seed=4, blend=blend).pixel_values, output_type="np"
        )[0]
        for blend in ("paste", "poisson")
    )
    np.testing.assert_array_equal(written(tmp_path)["image-00000.png"], expected)
    assert (expected != blended).any()


def test_the_box_counts_in_pixels_of_the_file(edit, tmp_path, picture):
    assert edit("--box", "8,0,16,8", "-n", 1, "--particles", 2)[0] == 0
    inside = np.zeros((16, 16), dtype=bool)
    inside[:4, :4] = True
    assert changed(tmp_path, picture)[inside].any()
    assert not changed(tmp_path, picture)[~inside].any()


def test_a_mask_picture_marks_what_is_white(edit, tmp_path, picture):
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (8 + 24, 16, 8 + 32, 24))
    mask.save(tmp_path / "mask.png")
    assert edit("--mask", tmp_path / "mask.png", "-n", 1, "--particles", 2)[0] == 0
    inside = np.zeros((16, 16), dtype=bool)
    inside[8:12, 12:] = True
    assert changed(tmp_path, picture)[inside].any()
    assert not changed(tmp_path, picture)[~inside].any()


def test_the_lower_half_is_drawn_exactly_with_one_particle(edit, tmp_path, picture):
    code, stdout, _ = edit("--lower-half", "-n", 2)
    assert code == 0
    assert stdout.startswith(
        "exact with one particle: nothing is kept after the first code that is redrawn\n"
    )
    assert not changed(tmp_path, picture)[:8].any()
    assert changed(tmp_path, picture)[8:].any()


def test_dilation_grows_what_is_drawn(edit, tmp_path, picture):
    assert edit("--box", "8,0,16,8", "--dilation", 1, "-n", 1, "--particles", 2)[0] == 0
    assert changed(tmp_path, picture)[:8, 4:8].any()
    assert not changed(tmp_path, picture)[:, 8:].any()


def test_the_same_seed_draws_the_same_variants(edit, tmp_path):
    found = []
    for seed in (1, 1, 2):
        assert edit("--lower-half", "--seed", seed, "-n", 1)[0] == 0
        found.append(written(tmp_path)["image-00000.png"])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "what to redraw: expected one of --mask, --box and --lower-half"),
        (["--lower-half", "--box", "0,0,8,8"], "expected one of --mask, --box and --lower-half"),
        (["--box", "1,2,3"], "--box is '1,2,3': expected LEFT,TOP,RIGHT,BOTTOM in whole pixels"),
        (["--box", "a,b,c,d"], "--box is 'a,b,c,d': expected LEFT,TOP,RIGHT,BOTTOM"),
        (["--box", "9,0,9,8"], "--box is 9,0,9,8: expected 0 <= left < right <= 48 and 0 <= top < bottom <= 32"),
        (["--box", "0,0,50,8"], "--box is 0,0,50,8: expected"),
        (["--box", "0,0,8,32"], "nothing is marked in the centred square of the image"),
        (["--mask", "{small}"], "small.png is 16 x 16 pixels: expected the image's 48 x 32"),
        (["--mask", "{black}"], "nothing is marked in the centred square"),
        (["--mask", "missing.png"], "missing.png': expected an existing file"),
        (["--lower-half", "-l", "mellanoma"], "label 'mellanoma' is not a class of this model"),
        (["--box", "8,0,16,8", "--particles", 0], "num_particles is 0: expected a whole number of at least 1"),
        (["--lower-half", "--dilation", -1], "dilation is -1: expected 0 codes or more"),
        (["--lower-half", "--seed", -1], "seed is -1: expected 0 or more"),
    ],
)  # fmt: skip
def test_edit_refuses_what_has_no_meaning(edit, tmp_path, options, message):
    masks = {"small": Image.new("L", (16, 16), 255), "black": Image.new("L", (WIDTH, HEIGHT))}
    for name, mask in masks.items():
        mask.save(tmp_path / f"{name}.png")
    places = {name: tmp_path / f"{name}.png" for name in masks}
    code, _, stderr = edit(*(str(option).format(**places) for option in options))
    line = stderr.strip().splitlines()[-1]
    assert code == 1
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists(), "nothing is written before the arguments are checked"


def test_a_missing_image_is_named(edit):
    code, _, stderr = edit("--lower-half", image="no.png")
    assert code == 1
    assert "no.png" in stderr
