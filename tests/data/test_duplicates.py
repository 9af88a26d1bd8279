"""Near-duplicates: planted copies are found and nothing else, the index equals brute force, reports count."""

import io
import json

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from isic_vq.data import duplicates
from isic_vq.data.augmentation import view
from isic_vq.data.duplicates import (
    MAX_DISTANCE,
    SIGNATURE_BYTES,
    DuplicatePair,
    drop_from_train,
    duplicate_report,
    find_duplicates,
    near_hashes,
    signature,
)
from isic_vq.data.synthetic_images import synthetic_image
from isic_vq.models.image_processing_isic_vq import ImageError

NUM_IMAGES = 48


def _jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _in_view(image, number):
    return Image.fromarray(np.ascontiguousarray(view(np.asarray(image), number)))


def _frame(image, radius):
    """Blacken what is outside a circle, as the tube of a dermoscope does."""
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    return Image.fromarray(np.asarray(image) * (np.hypot(x, y) < radius)[..., None].astype(np.uint8))


COPIES = {
    "the same": lambda image: image,
    "recompressed at 75": lambda image: _jpeg(image, 75),
    "recompressed at 50": lambda image: _jpeg(image, 50),
    "half the size": lambda image: image.resize((80, 80)),
    "twice the size": lambda image: image.resize((320, 320), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "grey": lambda image: image.convert("L"),
    "with its sides": lambda image: _with_sides(image),
    "turned, small and recompressed": lambda image: _jpeg(_in_view(image, 5).resize((96, 96)), 60),
    **{f"view {number}": lambda image, number=number: _in_view(image, number) for number in range(1, 8)},
}


def _with_sides(image):
    """The wide photograph whose centred square is the image."""
    wide = Image.new("RGB", (image.width + 60, image.height), (210, 160, 140))
    wide.paste(image, (30, 0))
    return wide


@pytest.fixture(scope="module")
def images():
    return [synthetic_image(index, seed=3) for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def signatures(images):
    return [signature(image) for image in images]


def _around(hashes, rows, bits, rng):
    """Hashes that differ from those of some rows in so many random bits."""
    flips = [sum(1 << int(bit) for bit in rng.choice(64, bits, replace=False)) for _ in range(8 * len(rows))]
    return hashes[rows] ^ np.array(flips, dtype=np.uint64).reshape(-1, 8)


def _brute_force(hashes):
    """All matches by comparing all pairs bit by bit, one at a time."""
    bits = [[bin(int(value))[2:].zfill(64) for value in row] for row in hashes]
    return [
        (first, second, number)
        for first in range(len(bits))
        for number in range(8)
        for second in range(first + 1, len(bits))
        if sum(a != b for a, b in zip(bits[first][number], bits[second][0], strict=True)) <= 8
    ]


@pytest.mark.parametrize("kind", COPIES)
def test_every_planted_copy_is_found_and_nothing_else(kind, images, signatures):
    copies = [signature(COPIES[kind](image)) for image in images[:12]]
    found = {(pair.first, pair.second) for pair in find_duplicates(signatures + copies)}
    assert found == {(row, NUM_IMAGES + row) for row in range(12)}


def test_different_pictures_are_no_pair(signatures):
    assert find_duplicates(signatures) == []


@pytest.mark.parametrize("radius", [0.85, 1.0])
def test_a_common_frame_makes_no_pair_and_hides_no_copy(images, radius):
    framed = [_frame(image, radius) for image in images]
    copies = [_jpeg(_in_view(image, 3), 75) for image in framed[:8]]
    found = {(pair.first, pair.second) for pair in find_duplicates(list(map(signature, framed + copies)))}
    assert found == {(row, NUM_IMAGES + row) for row in range(8)}


def test_another_crop_off_the_centre_is_not_promised_and_not_mistaken(images, signatures):
    corners = [signature(image.crop((0, 0, 130, 130))) for image in images]
    for pair in find_duplicates(signatures + corners):
        assert pair.second == pair.first + NUM_IMAGES, "if a crop is found, it is as its own image"


@pytest.mark.parametrize("number", range(8))
def test_the_view_of_a_pair_turns_the_first_into_the_second(number, images):
    second = _in_view(images[0], number)
    (pair,) = find_duplicates([signature(images[0]), signature(second)])
    assert np.array_equal(view(np.asarray(images[0]), pair.view), np.asarray(second))
    assert pair.distance <= MAX_DISTANCE
    assert pair.similarity > 0.95


def test_of_several_views_that_match_the_best_is_told():
    rng = np.random.default_rng(0)
    table = np.zeros(2, duplicates._SIGNATURE)  # all hashes are equal: every view is near
    drawn = rng.integers(-30, 31, (32, 32))
    table["detail"][0] = drawn + drawn[:, ::-1] + rng.integers(-5, 6, (32, 32))  # nearly its own mirror image
    table["detail"][1] = view(table["detail"][0], 6)
    (pair,) = find_duplicates([row.tobytes() for row in table])
    assert (pair.view, pair.distance) == (6, 0)
    assert pair.similarity == pytest.approx(1)


def test_signature_has_a_fixed_length_and_repeats(images):
    assert signature(images[0]) == signature(images[0].copy())
    assert {len(signature(synthetic_image(0, seed=3, size=size))) for size in (16, 31, 200)} == {
        SIGNATURE_BYTES
    }


def test_signature_of_encoded_bytes_is_that_of_the_same_photograph(images):
    large = images[0].resize((1200, 900), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    large.save(file, format="JPEG", quality=90)
    (pair,) = find_duplicates([signature(large), signature(file.getvalue())])
    assert pair.similarity > 0.95


def test_hashes_are_those_of_imagehash_in_every_view(signatures):
    content = np.frombuffer(signatures[0], np.uint8)
    hashes, detail = content[:64].view("<u8"), content[64:].view(np.int8).reshape(32, 32)
    for number in range(8):
        picture = view((detail.astype(int) + 128).astype(np.uint8), number)
        expected = imagehash.phash(Image.fromarray(np.ascontiguousarray(picture))).hash.ravel()
        spread = [bit for band in range(3) for bit in range(band, 64, 3)]
        assert [int(hashes[number]) >> place & 1 for place in range(64)] == expected[spread].tolist()


def test_detail_forgets_light_and_contrast_but_not_the_picture():
    rng = np.random.default_rng(0)
    texture = rng.uniform(-40, 40, (32, 32))
    slope = np.linspace(-30, 30, 32)[:, None]

    def detail(pixels):
        return duplicates._detail(Image.fromarray(pixels.astype(np.uint8)))

    def correlation(a, b):
        return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    plain = detail(128 + texture)
    assert correlation(plain, detail(150 + texture)) > 0.99
    assert correlation(plain, detail(128 + slope + texture)) > 0.97
    assert correlation(plain, detail(128 + 0.5 * texture)) > 0.97
    assert abs(correlation(plain, detail(128 + rng.permutation(texture.ravel()).reshape(32, 32)))) < 0.2


def test_a_frame_is_what_is_dark_up_to_the_edge():
    pixels = np.full((32, 32), 150, np.uint8)
    pixels[:6] = 5  # from the edge
    pixels[14:20, 14:20] = 5  # a black lesion
    level = np.asarray(duplicates._frame_level(Image.fromarray(pixels)))
    assert (level[:6] == 5).all()
    assert (level[6:] == 32).all(), "a lesion is no frame, however dark"


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((40, 40)),
        np.full((40, 40), 200),
        np.tile(np.linspace(50, 250, 64), (64, 1)),
        255 * (np.hypot(*np.mgrid[-1:1:64j, -1:1:64j]) < 0.9),
    ],
    ids=["black", "one colour", "ramp", "empty frame"],
)
def test_an_image_without_detail_is_never_a_duplicate(pixels):
    image = Image.fromarray(pixels.astype(np.uint8))
    assert find_duplicates([signature(image), signature(image)]) == []


def test_rows_are_counted_with_the_images_without_detail(images):
    plain = signature(Image.new("RGB", (32, 32), "white"))
    found = find_duplicates([plain, signature(images[0]), plain, signature(images[0])])
    assert [(pair.first, pair.second) for pair in found] == [(1, 3)]


def test_an_icon_has_no_signature():
    with pytest.raises(ImageError, match="1 x 1|1x1"):
        signature(Image.new("RGB", (1, 1)))


def test_nothing_has_no_duplicates(images):
    assert find_duplicates([]) == []
    assert find_duplicates([signature(images[0])]) == []


def test_signature_of_another_length_is_refused(signatures):
    with pytest.raises(ValueError, match=f"signature 1 has 3 bytes, expected {SIGNATURE_BYTES}"):
        find_duplicates([signatures[0], b"abc"])


def test_among_copies_every_two_are_a_pair(images):
    copies = [signature(_jpeg(images[0], quality)) for quality in (60, 70, 80, 90)]
    found = [(pair.first, pair.second) for pair in find_duplicates(copies)]
    assert found == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_the_index_equals_brute_force_on_clustered_hashes(monkeypatch, chunk):
    monkeypatch.setattr(duplicates, "_CHUNK", chunk)
    rng = np.random.default_rng(1)
    centres = rng.integers(0, 2**64, (6, 8), dtype=np.uint64)
    centres[:, 1:4] = centres[:, :1]  # near in several views
    hashes = np.concatenate([_around(centres, rng.integers(0, 6, 10), bits, rng) for bits in (0, 2, 4, 5)])
    expected = _brute_force(hashes)
    assert len(expected) > 200, "some are near"
    assert len(expected) < 40 * 39 * 4, "and some are not"
    assert list(zip(*(column.tolist() for column in near_hashes(hashes)), strict=True)) == expected


@settings(max_examples=8)  # tables of millions of buckets are laid out for each
@given(
    st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 63), max_size=14)), min_size=6, max_size=6)
)
def test_the_index_finds_a_hash_within_the_distance_wherever_the_bits_lie(planted):
    hashes = np.random.default_rng(0).integers(0, 2**64, (12, 8), dtype=np.uint64)
    for row, (number, bits) in enumerate(planted):
        hashes[6 + row, 0] = hashes[row, number] ^ np.uint64(sum(1 << bit for bit in bits))
    found = set(zip(*(column.tolist() for column in near_hashes(hashes)), strict=True))
    for row, (number, bits) in enumerate(planted):
        assert ((row, 6 + row, number) in found) == (len(bits) <= MAX_DISTANCE)


@pytest.mark.real_data
def test_the_untouched_files_are_found_at_their_reduced_versions(data_dir):
    (file,) = (data_dir / "uda1").glob("*.parquet")
    table = pq.read_table(file, columns=["image", "isic_id"]).to_pylist()
    raw = {path.stem: path.read_bytes() for path in sorted((data_dir / "raw").glob("*.jpg"))}
    reduced = [row for number, row in enumerate(table) if row["isic_id"] in raw or number % 5 == 0]
    names = [row["isic_id"] for row in reduced] + list(raw)
    contents = [row["image"]["bytes"] for row in reduced] + list(raw.values())
    found = [
        (names[pair.first], names[pair.second]) for pair in find_duplicates(list(map(signature, contents)))
    ]
    assert len(raw) == 12
    assert sorted(found) == [(name, name) for name in sorted(raw)]


PAIRS = [
    DuplicatePair(0, 1, 0, 2, 0.9),
    DuplicatePair(0, 3, 4, 0, 0.97),
    DuplicatePair(2, 4, 0, 0, 1.0),
    DuplicatePair(3, 4, 1, 0, 0.95),
]
SPLITS = ["train", "validation", "train", "test", "train"]
NAMES = ["a", "b", "c", "d", "e"]


def test_training_rows_that_show_a_held_out_photograph_are_dropped_with_the_nearest_as_reason():
    assert drop_from_train(PAIRS, SPLITS, NAMES) == {
        0: "same photograph as d of test",
        4: "same photograph as d of test",
    }


def test_nothing_is_dropped_within_a_split_or_between_held_out_or_excluded_images():
    for splits in (
        ["train"] * 5,
        ["validation", "test", "test", "test", "test"],
        ["train", *["excluded"] * 4],
    ):
        assert drop_from_train(PAIRS, splits, NAMES) == {}


def test_report_counts_pairs_by_what_they_join():
    rows = [
        {"isic_id": "a", "lesion_id": "l", "source": "x", "split": "train"},
        {"isic_id": "b", "lesion_id": "l", "source": "x", "split": "validation"},
        {"isic_id": "c", "lesion_id": "m", "source": "x", "split": "train"},
        {"isic_id": "a", "lesion_id": None, "source": None, "split": "test"},
        {"isic_id": "e", "lesion_id": "n", "source": "y", "split": "train"},
    ]
    report = json.loads(json.dumps(duplicate_report(PAIRS, rows)))
    assert report["num_images"] == 5
    assert report["num_pairs"] == 4
    assert report["relations"] == {
        "different lesions": 1,
        "same isic_id": 1,
        "same lesion": 1,
        "unknown lesion": 1,
    }
    assert report["sources"] == {"unknown / x": 1, "unknown / y": 1, "x / x": 1, "x / y": 1}
    assert report["splits"] == {"test / train": 2, "train / train": 1, "train / validation": 1}
    assert report["views"] == {"0": 2, "1": 1, "4": 1}
