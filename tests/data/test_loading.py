"""Loading: pixels as the image processor makes them, corrupt images named and counted, streams as data sets."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from isic_vq.data.loading import DecodedImages, SkipCounter, collate, iter_batches
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources import open_source
from isic_vq.data.synthetic_images import synthetic_image, synthetic_record
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

LABEL2ID = {"melanoma": 0, "nevus": 1}


@pytest.fixture
def processor():
    return IsicVQImageProcessor(size=32)


@pytest.fixture
def damaged_folder(image_folder):
    """The image folder with three damaged files: empty, cut short, not an image."""
    (image_folder / "001.png").write_bytes(b"")
    (image_folder / "002.png").write_bytes((image_folder / "002.png").read_bytes()[:900])
    (image_folder / "015.png").write_text("this is no image")
    return image_folder


DAMAGED = ["SYNTHETIC_0_0000001", "SYNTHETIC_0_0000002", "SYNTHETIC_0_0000015"]


def _batch(num_sound, skipped):
    items = [{"pixels": np.zeros((2, 2, 3), np.uint8), "label": 0, "index": i} for i in range(num_sound)]
    return collate(items + [{"index": 0, "error": reason} for reason in skipped])


@pytest.mark.parametrize("cache", [False, True])
def test_item_is_what_the_processor_makes(image_folder, processor, cache):
    images = DecodedImages(open_source(str(image_folder)), processor, LABEL2ID, cache)
    for index in (0, 1, 5, 5, 0):
        item = images[index]
        expected = processor(synthetic_image(index, seed=0, size=48), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(collate([item])["pixel_values"][0], expected)
        assert item["pixels"].dtype == np.uint8
        assert item["index"] == index
    assert len(images) == 16


def test_diagnosis_that_the_model_lacks_gets_the_unconditional_id(image_folder, processor):
    images = DecodedImages(open_source(str(image_folder)), processor, LABEL2ID)
    assert [images[i]["label"] for i in range(16)] == [0, 1, 2, 2, 2, 2, 2, 2] * 2


def test_without_classes_every_label_is_the_unconditional_id(image_folder, processor):
    images = DecodedImages(open_source(str(image_folder)), processor)
    assert {images[i]["label"] for i in range(16)} == {0}


def test_cache_decodes_each_image_once(image_folder, processor):
    images = DecodedImages(open_source(str(image_folder)), processor, cache=True)
    first = [images[i] for i in range(16)]
    for path in image_folder.glob("*.png"):
        path.unlink()
    for index, item in enumerate(first):
        assert np.array_equal(images[index]["pixels"], item["pixels"])


def test_changing_an_item_leaves_the_cache_alone(image_folder, processor):
    images = DecodedImages(open_source(str(image_folder)), processor, cache=True)
    before = images[0]["pixels"].copy()
    with pytest.raises(ValueError, match="read-only"):
        images[0]["pixels"][:] = 0
    collate([images[0]])["pixel_values"].zero_()
    assert np.array_equal(images[0]["pixels"], before)


@pytest.mark.parametrize("cache", [False, True])
def test_corrupt_image_becomes_a_named_error(damaged_folder, processor, cache):
    images = DecodedImages(open_source(str(damaged_folder)), processor, cache=cache)
    for _ in range(2):
        items = [images[i] for i in (1, 2, 15)]
        assert all(set(item) == {"index", "error"} for item in items)
        for item, name in zip(items, DAMAGED, strict=True):
            assert item["error"].startswith(f"{name}: ")
            assert str(damaged_folder) not in item["error"]


def test_record_without_an_image_is_an_error_item(processor):
    row = {**synthetic_record(0, 0), "image": None}
    images = DecodedImages(Dataset.from_list([row], features=FEATURES), processor)
    assert images[0] == {"index": 0, "error": "SYNTHETIC_0_0000000: the record has no image"}


def test_empty_bytes_are_not_looked_up_as_a_file(image_folder, processor, monkeypatch):
    row = {**synthetic_record(0, 0), "image": {"bytes": b"", "path": "000.png"}}
    images = DecodedImages(Dataset.from_list([row], features=FEATURES), processor)
    monkeypatch.chdir(image_folder)
    assert "error" in images[0]


@pytest.mark.parametrize("index", [-1, 16])
def test_index_outside_is_an_index_error(image_folder, processor, index):
    with pytest.raises(IndexError, match="is not in 0 to 15"):
        DecodedImages(open_source(str(image_folder)), processor)[index]


def test_collate_leaves_out_corrupt_items(damaged_folder, processor):
    images = DecodedImages(open_source(str(damaged_folder)), processor, LABEL2ID)
    batch = collate([images[i] for i in range(4)])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["indices"].tolist() == [0, 3]
    assert batch["labels"].tolist() == [0, 2]
    assert [reason.split(":")[0] for reason in batch["skipped"]] == DAMAGED[:2]


def test_batch_of_corrupt_images_only_is_still_a_batch():
    batch = _batch(0, ["a: broken", "b: broken"])
    assert batch["pixel_values"].shape == (0, 3, 0, 0)
    assert (batch["labels"].shape, batch["indices"].shape) == ((0,), (0,))
    assert (batch["labels"].dtype, batch["indices"].dtype) == (torch.int64, torch.int64)
    assert batch["skipped"] == ["a: broken", "b: broken"]


def test_data_loader_workers_give_the_same_batches(damaged_folder, processor):
    images = DecodedImages(open_source(str(damaged_folder)), processor, LABEL2ID)
    plain, workers = (
        list(DataLoader(images, batch_size=5, num_workers=n, collate_fn=collate)) for n in (0, 2)
    )
    for a, b in zip(plain, workers, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert torch.equal(a["indices"], b["indices"])
        assert a["skipped"] == b["skipped"]


def test_counter_logs_each_corrupt_image_once(caplog):
    counter = SkipCounter(max_share=0.5)
    with caplog.at_level(logging.WARNING, logger="isic_vq.data.loading"):
        for _ in range(3):
            counter.count(_batch(2, ["a: broken", "b: cut short"]))
    assert [record.getMessage() for record in caplog.records] == [
        "Skipped a corrupt image: a: broken",
        "Skipped a corrupt image: b: cut short",
    ]
    assert (counter.num_images, counter.num_skipped) == (12, 6)


def test_counter_knows_a_corrupt_image_by_its_name(caplog):
    counter = SkipCounter(max_share=1)
    for reason in ("a: broken at 0x1", "a: broken at 0x2", "b: broken at 0x2"):
        counter.count(_batch(0, [reason]))
    assert len(caplog.records) == 2


def test_counter_raises_past_the_share_and_names_examples():
    counter = SkipCounter(max_share=0.1, min_images=20)
    counter.count(_batch(8, ["a: broken", "b: broken"]))
    with pytest.raises(
        DataError, match="3 of 20 images are corrupt, more than the allowed share of 0.1.*c: broken"
    ):
        counter.count(_batch(9, ["c: broken"]))


def test_counter_takes_the_true_share_at_the_end():
    counter = SkipCounter(max_share=0.1, min_images=1000)
    counter.count(_batch(3, ["a: broken"]))
    with pytest.raises(DataError, match="1 of 4 images are corrupt"):
        counter.finish()


def test_counter_allows_exactly_the_share():
    counter = SkipCounter(max_share=0.1, min_images=0)
    counter.count(_batch(9, ["a: broken"]))
    counter.finish()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="expected a share from 0 to 1"):
        SkipCounter(max_share=share)


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_cover_the_source_in_order(image_folder, processor, streaming):
    source = open_source(str(image_folder), streaming)
    batches = list(iter_batches(source, processor, batch_size=6, label2id=LABEL2ID))
    assert [len(batch["isic_ids"]) for batch in batches] == [6, 6, 4]
    assert torch.cat([batch["indices"] for batch in batches]).tolist() == list(range(16))
    assert sum((batch["isic_ids"] for batch in batches), []) == [f"SYNTHETIC_0_{i:07d}" for i in range(16)]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 2, 2, 2, 2, 2, 2] * 2
    images = DecodedImages(open_source(str(image_folder)), processor)
    expected = collate([images[i] for i in range(16)])["pixel_values"]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_leave_out_corrupt_images_and_keep_ids_aligned(damaged_folder, processor, streaming):
    source = open_source(str(damaged_folder), streaming)
    batches = list(iter_batches(source, processor, batch_size=1, max_corrupt_share=0.2))
    assert len(batches) == 13, "a batch without a sound image is left out"
    for batch in batches:
        assert batch["isic_ids"] == [f"SYNTHETIC_0_{i:07d}" for i in batch["indices"].tolist()]
    joint = list(iter_batches(source, processor, batch_size=16, max_corrupt_share=0.2))
    assert [reason.split(":")[0] for reason in joint[0]["skipped"]] == DAMAGED
    assert np.all(joint[0]["pixel_values"].numpy() == torch.cat([b["pixel_values"] for b in batches]).numpy())


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_corrupt_images_stop_the_batches(damaged_folder, processor, streaming):
    source = open_source(str(damaged_folder), streaming)
    with pytest.raises(DataError, match="images are corrupt, more than the allowed share of 0.01"):
        list(iter_batches(source, processor, batch_size=4))


@pytest.mark.real_data
def test_real_images_decode_without_a_skip(data_dir, processor):
    batches = list(iter_batches(open_source("${ISIC_VQ_DATA}/uda1/*.parquet"), processor, 64, LABEL2ID))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert torch.bincount(labels).tolist() == [158, 395, 2]
    assert not any(batch["skipped"] for batch in batches)
    mean = torch.cat([batch["pixel_values"] for batch in batches]).mean((0, 2, 3))
    assert mean[0] > mean[1:].max(), "skin is red"


@pytest.mark.real_data
def test_untouched_archive_files_decode(data_dir, processor):
    (batch,) = iter_batches(open_source("${ISIC_VQ_DATA}/raw"), processor, 16)
    assert batch["pixel_values"].shape == (12, 3, 32, 32)
