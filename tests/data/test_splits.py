"""Splits: disjoint by lesion, independent of order, nested in the share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.data.parts import open_part
from isic_vq.data.schema import DataError
from isic_vq.data.sources import open_source
from isic_vq.data.splits import (
    Assignment,
    Stratum,
    _groups,
    _keys,
    _split_of,
    assign_splits,
    few_images,
    split_rows,
    stratified_report,
    warn_of_shared,
)
from isic_vq.data.synthetic_images import synthetic_image

NUMBERS = st.integers(0, 2**32)


def row(lesion=None, patient=None, image=None, **more):
    return {"lesion_id": lesion, "patient_id": patient, "isic_id": image, **more}


def components(rows):
    """The name of each record's group."""
    return [name for _, name in _groups([_keys(row) for row in rows])]


def in_validation(group, share, seed):
    return _split_of(group, {"validation": share}, seed) == "validation"


def test_group_is_the_lesion_else_the_patient_else_the_image():
    assert components([row("l", None, "i"), row(None, "p", "j"), row(None, "", "k")]) == ["l", "p", "k"]
    assert components([row("x", None, "i"), row(None, "x", "j")]) == ["x", "x"], "the names, not the groups"
    split = assign_splits([row("x", None, "i"), row(None, "x", "j")], {}, wanted=["train", "test"])
    assert [a.split for a in split] == ["train", "test"], "a lesion and a patient of one name are two"


def test_a_lesion_and_a_patient_are_one_group_over_any_bridge():
    rows = [row("b", "p"), row("a", "q"), row("b", "q"), row("c", None), row(None, "p")]
    assert components(rows) == ["a", "a", "a", "c", "a"]


def test_record_without_ids_cannot_be_split():
    with pytest.raises(DataError, match="none of lesion_id, patient_id, isic_id"):
        components([row()])


def test_ids_that_validation_shares_with_training_are_told(caplog):
    train = {"lesion_id": ["L1", None, "L3"], "isic_id": ["a", "b", "c"]}
    warn_of_shared(train, {"lesion_id": [None, "L2"], "isic_id": ["d", None]})  # unknown is no id
    assert not caplog.records
    warn_of_shared(train, {"lesion_id": ["L3", "L2", None, "L1"], "isic_id": ["d", "b", "e", "a"]})
    warn_of_shared({"isic_id": ["a"]}, {"isic_id": ["b", "a"]})
    assert (
        "3 of 4 validation images share an id with training images, such as lesion_id L3:"
        in caplog.messages[0]
    )
    assert (
        "1 of 2 validation images share an id with training images, such as isic_id a:" in caplog.messages[1]
    )


def test_assignment_is_pinned():
    # recorded: a change here moves images between training and validation of published models
    assert [i for i in range(30) if in_validation(str(i), 0.25, seed=0)] == [7, 15, 18, 20, 25]


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=2, max_size=30), NUMBERS, st.randoms())
def test_split_is_a_partition_disjoint_by_group_and_free_of_order(lesions, seed, random):
    shuffled = random.sample(lesions, len(lesions))
    expected = {name: in_validation(name, 0.5, seed) for name in lesions}
    if len(set(expected.values())) < 2:
        with pytest.raises(DataError, match="Use more images, or another share or seed"):
            split_rows([row(name) for name in lesions], 0.5, seed)
        return
    for order in (lesions, shuffled):
        train, validation = split_rows([row(name) for name in order], 0.5, seed)
        assert train == [index for index, name in enumerate(order) if not expected[name]]
        assert validation == [index for index, name in enumerate(order) if expected[name]]


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
        split_rows([row("a"), row("b")], share, 0)


def test_images_stay_with_their_rows():
    dataset = open_source("synthetic:32:0")
    for side in (open_part("synthetic:32:0", part, 0.3)[0] for part in ("train", "validation")):
        for record in side:
            index = int(record["isic_id"].rsplit("_", 1)[1])
            assert record["image"].tobytes() == dataset[index]["image"].tobytes()


@pytest.mark.real_data
def test_no_lesion_of_ham10000_is_on_both_sides(data_dir):
    train, validation = (
        open_part("${ISIC_VQ_DATA}/ham10000/*.parquet", part)[0] for part in ("train", "validation")
    )
    assert not set(train["lesion_id"]) & set(validation["lesion_id"])
    assert len(train) + len(validation) == 5984
    assert 480 < len(validation) < 720


# --- assignments that stay -----------------------------------------------------------------------------------------

SHARES = {"validation": 0.25, "test": 0.25}
IDS = st.one_of(st.none(), st.sampled_from([f"{kind}{number}" for kind in "a" for number in range(12)]))


@st.composite
def snapshots(draw, least=1, most=30):
    """Rows of random lesions and patients with bridges between them, each image once."""
    pairs = draw(st.lists(st.tuples(IDS, IDS), min_size=least, max_size=most))
    return [row(lesion, patient, f"i{number:03}") for number, (lesion, patient) in enumerate(pairs)]


def splits_of(rows, **options):
    return {r["isic_id"]: a.split for r, a in zip(rows, assign_splits(rows, SHARES, **options), strict=True)}


def assert_disjoint(rows, assignments):
    """No lesion and no patient in two splits, but for what is excluded."""
    for column in ("lesion_id", "patient_id"):
        sides = {}
        for r, a in zip(rows, assignments, strict=True):
            if r[column] and a.split != "excluded":
                assert sides.setdefault(r[column], a.split) == a.split, (column, r[column])


@given(snapshots(), NUMBERS, st.randoms())
def test_one_snapshot_is_disjoint_and_free_of_order(rows, seed, random):
    expected = assign_splits(rows, SHARES, seed)
    assert {a.split for a in expected} <= {"train", "validation", "test"}
    assert_disjoint(rows, expected)
    shuffled = random.sample(rows, len(rows))
    assert splits_of(shuffled, seed=seed) == {
        r["isic_id"]: a.split for r, a in zip(rows, expected, strict=True)
    }


@given(snapshots(most=40), st.integers(1, 39), NUMBERS, st.randoms())
def test_adding_images_never_moves_old_ones_and_what_disagrees_is_excluded(rows, cut, seed, random):
    random.shuffle(rows)
    old, new = rows[:cut], rows[cut:]
    before = assign_splits(old, SHARES, seed)
    after = assign_splits(new, SHARES, seed, frozen_rows=old, frozen=before)
    assert_disjoint([*old, *new], [*before, *after])
    everything = [*old, *new]
    groups = dict(zip((r["isic_id"] for r in everything), components(everything), strict=True))
    for r, a in zip(new, after, strict=True):
        of_old = {
            b.split for o, b in zip(old, before, strict=True) if groups[o["isic_id"]] == groups[r["isic_id"]]
        }
        if len(of_old) > 1:
            assert a.split == "excluded"
            assert a.reason.startswith("joins ")
        elif of_old:
            assert {a.split} == of_old
        else:
            assert a.split != "excluded"
    expected = {r["isic_id"]: a for r, a in zip(new, after, strict=True)}
    frozen = [(r, a) for r, a in zip(old, before, strict=True)]
    random.shuffle(frozen)
    random.shuffle(new)
    frozen_rows, assignments = [r for r, _ in frozen], [a for _, a in frozen]
    again = assign_splits(new, SHARES, seed, frozen_rows=frozen_rows, frozen=assignments)
    assert {r["isic_id"]: a for r, a in zip(new, again, strict=True)} == expected, "reasons, too"


@given(snapshots(), st.floats(0, 0.45), st.floats(0, 0.45), NUMBERS)
def test_larger_shares_only_take_from_training(rows, a, b, seed):
    small, large = ({"validation": s, "test": s} for s in sorted((a, b)))
    for before, after in zip(assign_splits(rows, small, seed), assign_splits(rows, large, seed), strict=True):
        assert before.split in ("train", after.split)


def test_shares_hold_on_average():
    rows = [row(f"l{number}", None, str(number)) for number in range(20_000)]
    found = [a.split for a in assign_splits(rows, {"validation": 0.1, "test": 0.2}, seed=1)]
    for split, share in (("validation", 0.1), ("test", 0.2), ("train", 0.7)):
        assert abs(found.count(split) / 20_000 - share) < 0.01


def test_a_bridge_between_old_groups_is_excluded_with_both_named():
    old = [row("IL_1", None, "a"), row(None, "IP_2", "b")]
    frozen = [Assignment("train"), Assignment("validation")]
    new = [row("IL_1", "IP_2", "c"), row("IL_1", None, "d"), row("IL_9", None, "e")]
    found = assign_splits(new, {}, frozen_rows=old, frozen=frozen)
    assert found[0] == Assignment("excluded", "joins lesion IL_1 in train and patient IP_2 in validation")
    assert found[1] == found[0], "in this snapshot it belongs to the same group"
    assert found[2] == Assignment("train")


def test_a_reason_names_what_the_image_itself_joins():
    old = [row("IL_1", None, "a"), row("IL_5", "IP_2", "b")]
    frozen = [Assignment("train"), Assignment("validation")]
    through_its_patient, through_its_group = assign_splits(
        [row("IL_1", "IP_2", "c"), row("IL_1", None, "d")], {}, frozen_rows=old, frozen=frozen
    )
    assert through_its_patient.reason == "joins lesion IL_1 in train and patient IP_2 in validation"
    assert through_its_group.reason == "joins lesion IL_1 in train and lesion IL_5 in validation"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_reason_names_the_smallest_of_a_group_in_any_order(order):
    old = [row("IL_7", "IP_1", "a"), row("IL_5", "IP_1", "b"), row("IL_9", None, "c")]
    frozen = [Assignment("test"), Assignment("test"), Assignment("train")]
    bridge = [row("IL_9", "IP_2", "d"), row("IL_8", "IP_2", "e"), row("IL_8", "IP_1", "f")]
    found = assign_splits(bridge, {}, frozen_rows=[old[n] for n in order], frozen=[frozen[n] for n in order])
    assert found[1].reason == "joins lesion IL_5 in test and lesion IL_9 in train"


def test_an_excluded_image_binds_nobody():
    old = [row("l", "p", "a")]
    found = assign_splits([row("l", None, "b")], {}, frozen_rows=old, frozen=[Assignment("excluded", "why")])
    assert found == [Assignment("train")]


def test_a_split_of_a_source_takes_its_groups_along():
    rows = [
        row("l", None, "a"),
        row("l", None, "b"),
        row("m", None, "c"),
        row("n", None, "d"),
        row("n", None, "e"),
    ]
    found = assign_splits(rows, {}, wanted=["test", None, None, "train", "validation"])
    assert [a.split for a in found] == ["test", "test", "train", "excluded", "excluded"]
    assert found[3].reason == "joins lesion n in train and lesion n in validation"


def test_what_was_assigned_before_outweighs_the_source():
    found = assign_splits(
        [row("l", None, "b"), row("l", None, "c")],
        {},
        wanted=["test", None],
        frozen_rows=[row("l", None, "a")],
        frozen=[Assignment("validation")],
    )
    assert found[0] == Assignment("excluded", "comes for test and joins lesion l in validation")
    assert found[1] == Assignment("validation")


def test_an_image_that_comes_twice_counts_once():
    rows = [row("l", None, "a"), row("m", None, "a"), row("n", None, "b")]
    found = assign_splits(rows, {}, frozen_rows=[row("o", None, "b")], frozen=[Assignment("train")])
    assert [a.split for a in found] == ["train", "excluded", "excluded"]
    assert found[1].reason == "has the isic_id of an earlier image"
    assert found[2].reason == "has the isic_id of an image that is there already"


def test_the_split_of_a_repeated_image_does_not_bind_its_group():
    rows = [row("l", None, "a"), row("m", None, "a"), row("m", None, "b")]
    found = assign_splits(rows, {}, wanted=["train", "test", None])
    assert found[1].split == "excluded"
    assert found[2] == Assignment("train")


@pytest.mark.parametrize(
    ("shares", "wanted", "message"),
    [
        ({"dev": 0.1}, None, "a share of 'dev': expected shares of validation and test"),
        ({"validation": 0.6, "test": 0.4}, None, "whose sum is below 1"),
        ({"validation": -0.1}, None, "numbers from 0 on"),
        ({}, ["dev"], "'dev' is not a split: expected train, validation, test"),
    ],
)
def test_shares_and_splits_that_are_none(shares, wanted, message):
    with pytest.raises(ValueError, match=message):
        assign_splits([row("l")], shares, wanted=wanted)


def test_the_report_counts_by_hand():
    more = {"source": "s", "sex": None, "license": "CC-0"}
    names = ["nevus", "nevus", "melanoma", "melanoma", "nevus"]
    rows = [row(str(number), diagnosis=name, **more) for number, name in enumerate(names)]
    assignments = list(map(Assignment, ["train", "test", "test", "test", "excluded"]))
    report = stratified_report(rows, assignments)
    assert [s for s in report if s.column == "diagnosis"] == [
        Stratum("diagnosis", "melanoma", "train", 0, 0.0, 0.0 - 2 / 5),
        Stratum("diagnosis", "melanoma", "test", 2, 2 / 3, 2 / 3 - 2 / 5),
        Stratum("diagnosis", "melanoma", "excluded", 0, 0.0, 0.0 - 2 / 5),
        Stratum("diagnosis", "nevus", "train", 1, 1.0, 1.0 - 3 / 5),
        Stratum("diagnosis", "nevus", "test", 1, 1 / 3, 1 / 3 - 3 / 5),
        Stratum("diagnosis", "nevus", "excluded", 1, 1.0, 1.0 - 3 / 5),
    ], "validation is empty and has no line"
    assert [(s.value, s.num_images, s.deviation) for s in report if s.column == "sex"] == [
        ("unknown", 1, 0.0),
        ("unknown", 3, 0.0),
        ("unknown", 1, 0.0),
    ]
    assert few_images(report) == [
        "melanoma: 2 images in test, fewer than 10; metrics of this class alone mean little there",
        "nevus: 1 images in test, fewer than 10; metrics of this class alone mean little there",
    ]


@pytest.mark.parametrize(("number", "warned"), [(0, True), (9, True), (10, False)])
def test_a_class_with_few_images_or_none_in_validation_is_named(number, warned):
    more = {"diagnosis": "melanoma", "source": None, "sex": None, "license": None}
    rows = [row(str(n), **more) for n in range(number)] + [row("n", **{**more, "diagnosis": "nevus"})] * 20
    rows.append(row("t", **more))
    splits = [Assignment("validation")] * (number + 20) + [Assignment("train")]
    assert [line.split(":")[0] for line in few_images(stratified_report(rows, splits))] == [
        "melanoma"
    ] * warned


# --- licences ------------------------------------------------------------------------------------------------------


def test_only_images_under_a_licence_are_opened(image_folder_with_licenses):
    records, info = open_part(f"folder:{image_folder_with_licenses}", licenses=["cc0"])
    assert sorted(records["isic_id"]) == ["a", "b"]
    assert info.licenses == {"CC-0": 1, "CC0-1.0": 1}
    assert info.num_images == 2
    assert info.attributions == ["Hospital A"]
    assert "(licence cc0)" in info.name
    everything = open_part(f"folder:{image_folder_with_licenses}")[1]
    assert everything.ids_sha256 != info.ids_sha256
    with pytest.raises(DataError, match="No image .* is under CC-BY; there are CC-0 .1 images., CC-BY-NC"):
        open_part(f"folder:{image_folder_with_licenses}", licenses=["CC-BY"])


@pytest.fixture
def image_folder_with_licenses(tmp_path):
    rows = [
        ("a", "CC-0", "Hospital A"),
        ("b", "CC0-1.0", ""),
        ("c", "CC-BY-NC", "Hospital C"),
        ("d", "", "Hospital D"),
    ]
    for number, (name, _, _) in enumerate(rows):
        synthetic_image(number, 0, size=16).save(tmp_path / f"{name}.png")
    lines = ["file_name,license,attribution", *(f"{name}.png,{license},{who}" for name, license, who in rows)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    return tmp_path
