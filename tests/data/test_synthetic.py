"""Synthetic pictures: fixed by seed and index, of skin colour, and different between diagnoses."""

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isic_vq.data.schema import FEATURES
from isic_vq.data.synthetic_images import (
    synthetic_fingerprint,
    synthetic_image,
    synthetic_metadata,
    synthetic_record,
)
from isic_vq.models.diagnosis import DIAGNOSES


def _mean_colour(name, part):
    """Mean RGB over pictures of a diagnosis: of the central third ("lesion") or of the corners ("skin")."""
    index = DIAGNOSES.index(name)
    pixels = np.stack(
        [np.asarray(synthetic_image(index + 8 * k, seed=0, size=96)) for k in range(12)]
    ).astype(float)
    if part == "lesion":
        return pixels[:, 36:60, 36:60].mean((0, 1, 2))
    return np.median(np.concatenate([pixels[:, 8:20, 40:56], pixels[:, 76:88, 40:56]]), axis=(0, 1, 2))


@given(st.integers(0, 10**6), st.integers(0, 2**40), st.sampled_from([32, 48, 128]))
def test_picture_depends_on_seed_index_and_size_only(index, seed, size):
    image = synthetic_image(index, seed, size)
    np.random.seed(index % 7)
    assert image.tobytes() == synthetic_image(index, seed, size).tobytes()
    assert (image.mode, image.size) == ("RGB", (size, size))


def test_another_process_draws_the_same_picture():
    code = (
        "import hashlib; from isic_vq.data.synthetic_images import synthetic_image; "
        "print(hashlib.sha256(synthetic_image(3, 4).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == hashlib.sha256(synthetic_image(3, 4).tobytes()).hexdigest()


def test_pictures_and_seeds_differ():
    pictures = {synthetic_image(i, seed, size=32).tobytes() for i in range(32) for seed in range(2)}
    assert len(pictures) == 64


def test_diagnoses_take_turns_and_leave_out_unknown():
    assert tuple(synthetic_metadata(i, 0)["diagnosis"] for i in range(9)) == (*DIAGNOSES[:8], DIAGNOSES[0])


def test_records_have_the_schema_and_the_pictures():
    records = [synthetic_record(index, seed=1) for index in range(3)]
    for index, record in enumerate(records):
        assert list(record) == list(FEATURES)
        decoded = Image.open(io.BytesIO(record["image"]["bytes"]))
        assert decoded.tobytes() == synthetic_image(index, seed=1).tobytes()
    assert len({record["lesion_id"] for record in records}) == 3


@pytest.mark.parametrize("name", DIAGNOSES[:8])
def test_surroundings_have_the_colour_of_skin(name):
    red, green, blue = _mean_colour(name, "skin")
    assert 255 > red > green > blue > 80, "skin is bright, and redder than it is blue"


def test_lesions_look_like_their_diagnosis():
    lesion = {name: _mean_colour(name, "lesion") for name in DIAGNOSES[:8]}
    darkness = sorted(lesion, key=lambda name: lesion[name].mean())
    assert darkness[0] == "melanoma", "a melanoma is the darkest"
    redness = {name: colour[0] - colour[1:].mean() for name, colour in lesion.items()}
    assert max(redness, key=redness.get) == "vascular_lesion", "a vascular lesion is the reddest"
    colours = np.stack(list(lesion.values()))
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e3 * np.eye(8)
    assert distances.min() > 5, "no two diagnoses have the same mean colour"


def test_fingerprint_depends_on_count_and_seed():
    assert synthetic_fingerprint(8, 0) == synthetic_fingerprint(8, 0)
    assert len({synthetic_fingerprint(*a) for a in ((8, 0), (9, 0), (8, 1), (40, 0), (41, 0))}) == 5
