"""Parts of a source: the same images whether it is streamed or not, and under the licences asked for alone."""

import pickle
from dataclasses import dataclass

import pytest
from test_splits import components, in_validation

from isic_vq.data import sources
from isic_vq.data.parts import licensed, open_part, split_source
from isic_vq.data.schema import DataError
from isic_vq.data.sources.base import hash_ids
from source_contract import CONTRACT, assert_stream_equals_the_data_set
from stream_only import StreamOnly

LICENSES = ("CC-0", "CC-BY-NC", None)
NUM_IMAGES = sum(StreamOnly.sizes)


@dataclass(frozen=True)
class Licensed(StreamOnly):
    """Its images take turns with the licences; none of the first part's is under the first one."""

    name = "licensed:test"

    def records_of(self, part, reading, with_images=True):
        return (self.licensed(record) for record in super().records_of(part, reading))

    def rows(self, reading):
        return map(self.licensed, super().rows(reading))

    def licensed(self, row):
        index = int(row["isic_id"].rsplit("_", 1)[1])
        name = LICENSES[index % 3] if index >= self.sizes[0] else None
        return {**row, "license": name, "attribution": name and f"Hospital {name}"}


@pytest.fixture(autouse=True)
def _schemes(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "streamonly", lambda target: StreamOnly())
    monkeypatch.setitem(sources.SOURCES, "licensed", lambda target: Licensed())


def find_part(uri, part="all", share=0.1, licenses=()):
    source = sources.find_source(uri)
    if part == "all":
        return licensed(source, licenses)
    return split_source(source, share, licenses)[part == "validation"]


def ids(source):
    return [record["isic_id"] for record in source.stream()]


def names(indices):
    return [f"SYNTHETIC_0_{index:07d}" for index in indices]


def test_without_a_wish_the_source_itself_is_found():
    assert find_part("streamonly:x") == StreamOnly()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_part_of_a_stream_holds_the_images_of_the_same_part_of_files(part):
    streamed, stored = find_part("streamonly:x", part, 0.3), find_part(f"synthetic:{NUM_IMAGES}:0", part, 0.3)
    groups = components(list(StreamOnly().metadata()))
    expected = [i for i, group in enumerate(groups) if in_validation(group, 0.3, 0) is (part == "validation")]
    assert ids(streamed) == ids(stored) == stored.dataset()["isic_id"][:] == names(expected)
    assert (streamed.has_random_access, stored.has_random_access) == (False, True)
    assert streamed.name == f"streamonly:test ({part} part, share 0.3)"
    assert streamed.describe().ids_sha256 == stored.describe().ids_sha256 == hash_ids(names(expected))


def test_two_parts_together_are_the_source():
    train, validation = (ids(find_part("streamonly:x", part, 0.3)) for part in ("train", "validation"))
    assert sorted(train + validation) == ids(StreamOnly())


def test_only_images_under_the_licence_are_read_and_told_of():
    source = find_part("licensed:x", licenses=["cc0"])
    expected = [index for index in range(StreamOnly.sizes[0], NUM_IMAGES) if index % 3 == 0]
    assert ids(source) == names(expected)
    assert {record["license"] for record in source.stream()} == {"CC-0"}
    info = source.describe()
    assert (info.num_images, info.licenses) == (len(expected), {"CC-0": len(expected)})
    assert info.attributions == ["Hospital CC-0"]
    assert sum(info.diagnoses.values()) == len(expected)
    assert info.ids_sha256 == hash_ids(names(expected))
    assert info.name == "licensed:test (licence cc0)"
    assert find_part("licensed:x", licenses=["CC-0", "CC BY-NC 4.0"]).describe().num_images > len(expected)


def test_images_without_a_licence_are_under_none():
    with pytest.raises(DataError, match=r"No image of licensed:test is under unknown; there are CC-0 \(\d+ "):
        find_part("licensed:x", licenses=["unknown"])
    with pytest.raises(ValueError, match="'MIT': expected CC-0, CC-BY or CC-BY-NC"):
        find_part("licensed:x", licenses=["MIT"])


def test_a_licence_moves_no_image_to_another_part():
    for part in ("train", "validation"):
        among_all = set(ids(find_part("licensed:x", part, 0.3)))
        under_one = set(ids(find_part("licensed:x", part, 0.3, ["CC-BY-NC"])))
        assert under_one
        assert under_one < among_all


@pytest.mark.parametrize("holds", [c for c in CONTRACT if c is not assert_stream_equals_the_data_set])
def test_a_part_of_a_stream_is_a_source(holds):
    holds(find_part("licensed:x", "train", 0.3, ["CC-0"]))


@pytest.mark.parametrize("holds", CONTRACT)
def test_a_part_of_files_is_a_source(holds):
    holds(find_part("synthetic:30:0", "train", 0.3))


def test_opening_gives_the_data_set_or_else_the_stream():
    records, info = open_part("synthetic:30:0", "train", 0.3)
    assert len(records) == info.num_images == len(records["isic_id"])
    records, info = open_part("streamonly:x", "train", 0.3)
    assert len(ids(pickle.loads(pickle.dumps(records)))) == info.num_images


def test_an_impossible_part_is_refused():
    with pytest.raises(ValueError, match="part is 'test': expected all, train or validation"):
        open_part("synthetic:30:0", "test")
