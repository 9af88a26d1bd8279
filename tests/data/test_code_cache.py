"""The code cache: bit-equal through its file, views as the images' views, and bound to one tokenizer."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from isic_vq.data.augmentation import dihedral
from isic_vq.data.code_cache import (
    METADATA_KEY,
    CodeCache,
    check_tokenizer,
    read_code_cache,
    tokenizer_hash,
    write_code_cache,
)
from isic_vq.data.encoding import encode_source
from isic_vq.data.schema import DataError
from isic_vq.data.sources import describe_source, open_source
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel


def make_model(**changes):
    fields = {"image_size": 16, "hidden_sizes": (4, 4), "residual_size": 4, "num_codes": 16, "code_dim": 4}
    torch.manual_seed(0)
    return VQVAEModel(VQVAEConfig(**{**fields, **changes})).eval()


@pytest.fixture
def model():
    return make_model()


def encode(model, folder, **options):
    uri = f"folder:{folder}"
    processor = IsicVQImageProcessor(size=16)
    return encode_source(model, processor, open_source(uri), describe_source(uri), **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of random codes, with codes at both ends of uint16's range."""
    codes = np.random.default_rng(0).integers(0, 2**16, (5, 3, 4, 4)).astype(np.uint16)
    codes[0, 0, 0, :2] = 0, 2**16 - 1
    diagnoses = ["nevus", "melanoma", "unknown", "nevus", "vascular_lesion"]
    source = describe_source("synthetic:5:3")
    return CodeCache(codes, [f"ISIC_{i}" for i in range(5)], diagnoses, 2**16, "0" * 64, source)


# Encoding


def test_codes_are_those_of_each_dihedral_view(model, image_folder):
    cache = encode(model, image_folder, batch_size=5)
    paths = [str(path) for path in sorted(image_folder.glob("*.png"))]
    pixel_values = IsicVQImageProcessor(size=16)(paths, return_tensors="pt")["pixel_values"]
    assert (cache.codes.shape, cache.codes.dtype) == ((16, 8, 4, 4), np.uint16)
    for view in range(8):
        expected = model.encode(dihedral(pixel_values, torch.full((16,), view)))
        assert np.array_equal(cache.codes[:, view], expected.numpy()), view
    assert not np.array_equal(cache.codes[:, 0], cache.codes[:, 1])


def test_fewer_views_are_the_first_of_the_eight(model, image_folder):
    assert np.array_equal(
        encode(model, image_folder, num_views=3).codes, encode(model, image_folder).codes[:, :3]
    )


def test_ids_diagnoses_and_source_come_from_the_records(model, image_folder):
    cache = encode(model, image_folder, num_views=1)
    assert cache.isic_ids == [f"SYNTHETIC_0_{index:07d}" for index in range(16)]
    assert cache.diagnoses == open_source(str(image_folder))["diagnosis"][:]
    assert (cache.num_codes, cache.source.name) == (16, "folder:images")


def test_corrupt_image_leaves_codes_and_diagnoses_aligned(model, image_folder):
    whole = encode(model, image_folder, num_views=1)
    (image_folder / "002.png").write_text("this is no image")
    cache = encode(model, image_folder, num_views=1, batch_size=4, max_corrupt_share=0.1)
    kept = [index for index in range(16) if index != 2]
    assert np.array_equal(cache.codes, whole.codes[kept])
    assert cache.diagnoses == [whole.diagnoses[index] for index in kept]
    assert cache.isic_ids == [whole.isic_ids[index] for index in kept]


def test_too_many_corrupt_images_are_an_error(model, image_folder):
    (image_folder / "002.png").write_text("this is no image")
    with pytest.raises(DataError, match="1 of 16 images are corrupt"):
        encode(model, image_folder)


def test_source_without_a_readable_image_is_an_error(model, image_folder):
    for path in image_folder.glob("*.png"):
        path.write_text("this is no image")
    with pytest.raises(DataError, match="folder:images holds no readable image"):
        encode(model, image_folder, max_corrupt_share=1)


@pytest.mark.parametrize("num_views", [0, 9])
def test_impossible_number_of_views_is_refused(model, image_folder, num_views):
    with pytest.raises(ValueError, match=f"num_views is {num_views}: expected 1 to 8"):
        encode(model, image_folder, num_views=num_views)
    with pytest.raises(ValueError, match="batch_size is 0: expected at least 1"):
        encode(model, image_folder, batch_size=0)


def test_codebook_beyond_uint16_is_refused_rather_than_wrapped_around(image_folder):
    with pytest.raises(ValueError, match="num_codes is 65537: expected at most 65536"):
        encode(make_model(num_codes=2**16 + 1, code_dim=1), image_folder)


# The file


def test_round_trip_is_equal_to_the_last_bit(cache, tmp_path):
    write_code_cache(cache, tmp_path / "new" / "codes.parquet")
    found = read_code_cache(tmp_path / "new" / "codes.parquet")
    assert np.array_equal(found.codes, cache.codes)
    assert found.codes.dtype == np.uint16
    for name in ("isic_ids", "diagnoses", "num_codes", "tokenizer_hash", "source"):
        assert getattr(found, name) == getattr(cache, name), name


def test_writing_twice_gives_the_same_bytes(cache, tmp_path):
    for name in ("a", "b"):
        write_code_cache(cache, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_counts_are_over_all_views(cache):
    assert np.array_equal(cache.counts().numpy(), np.bincount(cache.codes.ravel(), minlength=2**16))


def test_class_names_are_those_present_in_their_fixed_order(cache):
    assert cache.class_names() == ["melanoma", "nevus", "vascular_lesion"], "unknown is no class"


def test_missing_file_says_how_to_write_it(tmp_path):
    with pytest.raises(DataError, match="codes.parquet is not a file: write it with isic-vq encode"):
        read_code_cache(tmp_path / "codes.parquet")


def altered(cache, path, metadata=None, **columns):
    """The cache's file with some metadata or columns replaced."""
    write_code_cache(cache, path)
    table = pq.read_table(path)
    fields = json.loads(table.schema.metadata[METADATA_KEY]) | (metadata or {})
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    fields = {name: value for name, value in fields.items() if value is not None}
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(fields)}), path)


def text_file(cache, path):
    path.write_text("this is no parquet")


def cut_file(cache, path):
    write_code_cache(cache, path)
    path.write_bytes(path.read_bytes()[:-100])


def flipped_bytes(cache, path):
    write_code_cache(cache, path)
    content = bytearray(path.read_bytes())
    content[8:200] = bytes(192)
    path.write_bytes(content)


def other_parquet(cache, path):
    pq.write_table(pa.table({"isic_id": ["a"], "diagnosis": ["nevus"], "codes": [[1]]}), path)


@pytest.mark.parametrize(
    "damage",
    [
        text_file,
        cut_file,
        flipped_bytes,
        other_parquet,
        lambda cache, path: altered(cache, path, {"grid": None}),
        lambda cache, path: altered(cache, path, {"grid": [5, 5]}),
        lambda cache, path: altered(cache, path, {"num_codes": 100}),
        lambda cache, path: altered(cache, path, {"source": {"name": "mine"}}),
        lambda cache, path: altered(cache, path, codes=pa.array([1.5] * 5)),
        lambda cache, path: path.write_bytes(b""),
    ],
    ids=[
        "text",
        "cut",
        "flipped",
        "other-parquet",
        "no-grid",
        "other-grid",
        "codes-beyond-K",
        "other-source",
        "other-type",
        "empty",
    ],
)
def test_damaged_or_foreign_file_is_named_with_the_way_out(cache, tmp_path, damage):
    damage(cache, tmp_path / "codes.parquet")
    with pytest.raises(
        DataError, match=r"(?s)codes.parquet is not a code cache \(.*write it with isic-vq encode"
    ):
        read_code_cache(tmp_path / "codes.parquet")


# The tokenizer's hash


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("encoder.project.weight", True),
        ("encoder.down.0.1.running_mean", True),
        ("quantizer.codebook", True),
        ("decoder.to_pixels.weight", False),
        ("quantizer.cluster_size", False),
        ("quantizer.code_sums", False),
    ],
)
def test_hash_changes_with_what_decides_codes_and_nothing_else(model, name, changes):
    before = tokenizer_hash(model)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] += 1e-3
    assert (tokenizer_hash(model) != before) is changes


def test_hash_survives_saving_and_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert tokenizer_hash(VQVAEModel.from_pretrained(tmp_path)) == tokenizer_hash(model)


def test_codes_of_another_tokenizer_are_refused(model, image_folder):
    cache = encode(model, image_folder, num_views=1)
    check_tokenizer(cache, model, "train_codes")
    with torch.no_grad():
        model.quantizer.codebook[0] += 1e-3
    with pytest.raises(
        DataError, match="train_codes was encoded by another tokenizer: encode the images again"
    ):
        check_tokenizer(cache, model, "train_codes")
