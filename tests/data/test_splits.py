"""Splits: disjoint by lesion, independent of order, nested in the share."""

import pytest
from datasets import Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.data.schema import DataError
from isic_vq.data.sources import open_source
from isic_vq.data.splits import GROUP_COLUMNS, group_of, in_validation, split_by_group

NUMBERS = st.integers(0, 2**32)


def _dataset(lesions):
    rows = [{"lesion_id": name, "patient_id": None, "isic_id": f"i{i}"} for i, name in enumerate(lesions)]
    return Dataset.from_list(rows, features=Features({column: Value("string") for column in GROUP_COLUMNS}))


def test_group_is_the_lesion_else_the_patient_else_the_image():
    record = {"lesion_id": "l", "patient_id": "p", "isic_id": "i"}
    assert group_of(record) == "l"
    assert group_of({**record, "lesion_id": None}) == "p"
    assert group_of({**record, "lesion_id": None, "patient_id": ""}) == "i"


def test_record_without_ids_cannot_be_split():
    with pytest.raises(DataError, match="none of lesion_id, patient_id, isic_id"):
        group_of(dict.fromkeys(GROUP_COLUMNS))


def test_assignment_is_pinned():
    # recorded: a change here moves images between training and validation of published models
    assert [i for i in range(30) if in_validation(str(i), 0.25, seed=0)] == [7, 15, 18, 20, 25]


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=2, max_size=30), NUMBERS, st.randoms())
def test_split_is_a_partition_disjoint_by_group_and_free_of_order(lesions, seed, random):
    shuffled = random.sample(lesions, len(lesions))
    expected = {name: in_validation(name, 0.5, seed) for name in lesions}
    if len(set(expected.values())) < 2:
        with pytest.raises(DataError, match="Use more images, another share or another seed"):
            split_by_group(_dataset(lesions), 0.5, seed)
        return
    for order in (lesions, shuffled):
        train, validation = split_by_group(_dataset(order), 0.5, seed)
        assert train["lesion_id"][:] == [name for name in order if not expected[name]]
        assert validation["lesion_id"][:] == [name for name in order if expected[name]]


@given(st.text(min_size=1), NUMBERS, st.floats(0, 1), st.floats(0, 1))
def test_larger_share_only_adds_to_validation(group, seed, a, b):
    assert in_validation(group, min(a, b), seed) <= in_validation(group, max(a, b), seed)


def test_share_holds_on_average():
    count = sum(in_validation(str(i), 0.1, seed=3) for i in range(20_000))
    assert abs(count / 20_000 - 0.1) < 0.007, "three standard deviations of a binomial"


def test_seeds_give_different_splits():
    sides = [tuple(in_validation(str(i), 0.5, seed) for i in range(64)) for seed in range(8)]
    assert len(set(sides)) == 8


@pytest.mark.parametrize("share", [0, 1, -0.1, 10])
def test_share_outside_zero_and_one_is_refused(share):
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        split_by_group(_dataset("ab"), share, 0)


def test_images_stay_with_their_rows():
    dataset = open_source("synthetic:32:0")
    train, validation = split_by_group(dataset, 0.3, seed=0)
    for side in (train, validation):
        for record in side:
            index = int(record["isic_id"].rsplit("_", 1)[1])
            assert record["image"].tobytes() == dataset[index]["image"].tobytes()


@pytest.mark.real_data
def test_no_lesion_of_ham10000_is_on_both_sides(data_dir):
    train, validation = split_by_group(open_source("${ISIC_VQ_DATA}/ham10000/*.parquet"), 0.1, seed=0)
    assert not set(train["lesion_id"]) & set(validation["lesion_id"])
    assert len(train) + len(validation) == 5984
    assert 480 < len(validation) < 720
