"""Streams of training images: every image once an epoch, mixed, and resumed at any image."""

import itertools
import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from isic_vq.data import streaming
from isic_vq.data.loading import DecodedImages, collate
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.streaming import Position, StreamedImages, StreamViews, read_into_memory
from isic_vq.data.synthetic_images import synthetic_metadata
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from stream_only import StreamOnly, record_of


def images_of(source, window=5):
    return StreamedImages(source, IsicVQImageProcessor(size=8), source.describe().num_images, window)


@pytest.fixture(scope="module")
def images():
    return images_of(StreamOnly())


def ids(lane):
    return [item["isic_id"] for item, _ in lane]


def test_a_source_without_a_data_set_offers_no_random_access():
    assert not StreamOnly().has_random_access
    assert find_source("synthetic:4:0").has_random_access
    with pytest.raises(DataError, match="can only be read as a stream"):
        StreamOnly().dataset()


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 6, 8])
def test_lanes_share_an_epoch_and_none_is_read_twice(images, num_lanes):
    read = Counter(name for lane in range(num_lanes) for name in ids(images.lane(3, 1, lane, num_lanes)))
    assert read == Counter(synthetic_metadata(index, 0)["isic_id"] for index in range(40))


def test_epochs_and_seeds_differ_and_repeat(images):
    assert ids(images.lane(0, 0)) != ids(images.lane(0, 1))
    assert ids(images.lane(0, 0)) != ids(images.lane(1, 0))
    assert ids(images.lane(0, 0)) == ids(images_of(StreamOnly()).lane(0, 0))


@pytest.mark.parametrize("window", [1, 5, 12, 100])
def test_windows_of_the_parts_in_a_new_order_are_mixed(window):
    """The windows of an epoch, each in the order of its ids, are a permutation of whole parts."""
    stream = images_of(StreamOnly(), window)
    given = ids(stream.lane(0, 2))
    numbers = [int(name.rpartition("_")[2]) for name in given]
    windows = [sorted(numbers[start : start + window]) for start in range(0, 40, window)]
    if window == 1:
        starts = [part[0] for part in stream.parts]
        order = [number for number in numbers if number in starts]
        assert numbers == [n for start in order for part in stream.parts if part[0] == start for n in part]
        assert order != starts
    assert sum(windows, []) != numbers or window == 1, "a window keeps no order"
    reading = [int(name.rpartition("_")[2]) for name in ids(images_of(StreamOnly(), 1).lane(0, 2))]
    assert windows == [sorted(reading[start : start + window]) for start in range(0, 40, window)]


@pytest.mark.parametrize(("lane", "num_lanes"), [(0, 1), (1, 2)])
def test_a_lane_goes_on_exactly_from_any_image(images, lane, num_lanes):
    whole = list(images.lane(0, 4, lane, num_lanes))
    for done, (_, position) in enumerate(whole, 1):
        position = Position(**json.loads(json.dumps(asdict(position))))
        rest = list(images.lane(0, 4, lane, num_lanes, position))
        assert [item["isic_id"] for item, _ in rest] == [item["isic_id"] for item, _ in whole[done:]]
        assert [place for _, place in rest] == [place for _, place in whole[done:]]


def test_a_resumed_lane_reads_its_windows_and_no_earlier_part(monkeypatch):
    stream = images_of(StreamOnly())
    positions = [position for _, position in stream.lane(0, 0)]
    read = []
    monkeypatch.setattr(StreamOnly, "read", lambda self, part: (read.append(i) or record_of(i) for i in part))
    for done, position in enumerate(positions, 1):
        read.clear()
        next(stream.lane(0, 0, position=position), None)
        assert len(read) <= max(StreamOnly.sizes) + 2 * 5 + 1, f"after {done} images"


def test_memory_holds_two_windows_of_decoded_images(images, monkeypatch):
    """What was read is never further ahead of what was given out."""
    read = []
    decode = streaming.decoded_item
    monkeypatch.setattr(streaming, "decoded_item", lambda *a: read.append(0) or decode(*a))
    for given, _ in enumerate(images.lane(0, 0), 1):
        assert len(read) - given <= 5


def test_streamed_items_are_those_of_random_access(images):
    rows = DecodedImages(find_source("synthetic:40:0").dataset(), IsicVQImageProcessor(size=8))
    by_id = dict(zip(rows.records["isic_id"], map(rows.__getitem__, range(40)), strict=True))
    for item, _ in images.lane(0, 0):
        assert np.array_equal(item["pixels"], by_id[item["isic_id"]]["pixels"])


def test_a_corrupt_image_of_a_stream_is_a_named_error():
    items = [item for item, _ in images_of(StreamOnly(corrupt=11)).lane(0, 0)]
    batch = collate(items)
    assert len(batch["indices"]) == 39
    (skipped,) = batch["skipped"]
    assert skipped.startswith("SYNTHETIC_0_0000011: ")


def test_views_of_a_stream_are_even_and_follow_the_image_and_the_epoch():
    views = [StreamViews(0, epoch)[index] for epoch in (0, 1) for index in range(4000)]
    counts = np.bincount(views, minlength=8)
    assert len(counts) == 8
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3, "chi-squared of 7 degrees of freedom, p = 0.001"
    same = sum(a == b for a, b in zip(views[:4000], views[4000:], strict=True))
    assert abs(same - 500) < 4 * (4000 * 7 / 64) ** 0.5
    assert [StreamViews(0, 1)[index] for index in range(9)] == views[4000:4009]


def test_a_sample_is_the_beginning_of_an_order_and_bounded(images, monkeypatch):
    assert [item["isic_id"] for item in images.sample(6, seed=7)] == ids(
        itertools.islice(images.lane(7, 0), 6)
    )
    assert len(images.sample(100, seed=7)) == 40
    monkeypatch.setattr(streaming, "MAX_SAMPLE", 4)
    assert len(images.sample(6, seed=7)) == 4


def test_a_small_stream_is_read_into_memory_and_a_large_one_refused():
    records = read_into_memory(StreamOnly())
    assert records.to_list() == find_source("synthetic:40:0").dataset().to_list()
    size = sum(len(record_of(index)["image"]["bytes"]) for index in range(40))
    assert len(read_into_memory(StreamOnly(), size)) == 40
    with pytest.raises(
        DataError, match="streamonly:test streams over .* GiB: write it to files with isic-vq data prepare"
    ):
        read_into_memory(StreamOnly(), size - 1)
