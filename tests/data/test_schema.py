"""One schema: aliases, missing values, canonical diagnoses, and errors that name the row."""

import io
import math

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.data.schema import COLUMN_ALIASES, FEATURES, DataError, normalise
from isic_vq.models import diagnosis

HAM10000_ROW = {
    "image": {"bytes": b"...", "path": "ISIC_0031176.jpg"},
    "isic_id": "ISIC_0031176",
    "lesion_id": "HAM_0003952",
    "dx": "nv",
    "dx_type": "follow_up",
    "age": 45.0,
    "sex": "female",
    "localization": "trunk",
    "source": "vidir_molemax",
    "license": "CC-BY-NC-4.0",
    "attribution": "Tschandl et al.",
}


def test_row_of_ham10000_becomes_the_schema():
    assert normalise(HAM10000_ROW, "row 0") == {
        "image": HAM10000_ROW["image"],
        "isic_id": "ISIC_0031176",
        "lesion_id": "HAM_0003952",
        "patient_id": None,
        "diagnosis": "nevus",
        "age": 45.0,
        "sex": "female",
        "site": "torso",
        "source": "vidir_molemax",
        "license": "CC-BY-NC-4.0",
        "attribution": "Tschandl et al.",
    }


def test_row_of_the_archive_becomes_the_schema():
    row = {
        "isic_id": "ISIC_1",
        "age_approx": "60",
        "anatom_site_general": "head/neck",
        "copyright_license": "CC-0",
    }
    normal = normalise(row, "row 0")
    assert (normal["age"], normal["site"], normal["license"]) == (60.0, "head/neck", "CC-0")
    assert "image" not in normal


def test_aliases_cover_every_column_but_the_image():
    assert ["image", *COLUMN_ALIASES] == list(FEATURES)


@given(st.sampled_from([None, "", " ", "unknown", "Unknown", "NaN", "n/a", math.nan]))
def test_missing_is_none_and_a_missing_diagnosis_is_unknown(missing):
    row = dict.fromkeys(("isic_id", "lesion_id", "dx", "age", "sex", "localization", "license"), missing)
    expected = dict.fromkeys(COLUMN_ALIASES) | {"diagnosis": "unknown"}
    assert normalise(row, "row 0") == expected


def test_normalising_twice_changes_nothing():
    once = normalise(HAM10000_ROW, "row 0")
    assert normalise(once, "row 0") == once


def test_second_alias_fills_in_for_a_missing_first():
    assert normalise({"diagnosis": None, "dx": "mel"}, "row 0")["diagnosis"] == "melanoma"


def test_id_falls_back_on_the_file_name():
    assert normalise({"file_name": "a\\b/ISIC_7.v2.jpg"}, "row 0")["isic_id"] == "ISIC_7.v2"
    assert normalise({"image": {"bytes": b"", "path": "a/ISIC_8.jpg"}}, "row 0")["isic_id"] == "ISIC_8"


def test_class_ids_are_read_through_their_names():
    names = {"label": ["MEL", "NV"]}
    assert [normalise({"label": i}, "row 0", names)["diagnosis"] for i in (0, 1, None, -1)] == [
        "melanoma",
        "nevus",
        "unknown",
        "unknown",
    ]


def test_numbers_of_fed_isic2019_are_the_classes_in_their_order():
    names = {"label": ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"]}
    found = [normalise({"label": number}, "row 0", names)["diagnosis"] for number in range(8)]
    assert tuple(found) == diagnosis.DIAGNOSES[:8]


@pytest.mark.parametrize("number", [8, -2, "3"])
def test_a_class_id_without_a_name_is_refused(number):
    names = {"label": ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"]}
    with pytest.raises(DataError, match=f"row 0: label is {number!r}, expected 0 to 7 for MEL, NV.*classes="):
        normalise({"label": number}, "row 0", names)


def test_levels_of_the_archive_s_tables_are_read():
    row = {
        "isic_id": "ISIC_1",
        "diagnosis_1": "Benign",
        "diagnosis_2": "Benign melanocytic proliferations",
        "diagnosis_3": "Nevus",
        "diagnosis_4": math.nan,
        "diagnosis_5": "",
        "anatom_site_1": "Lower extremity",
        "anatom_site_2": "Foot",
        "anatom_site_3": None,
        "anatom_site_special": "",
    }
    normal = normalise(row, "row 0")
    assert (normal["diagnosis"], normal["site"]) == ("nevus", "lower extremity")
    special = normalise({**row, "anatom_site_special": "acral palms or soles"}, "row 0")
    assert special["site"] == "palms/soles"
    named = normalise({**row, "diagnosis": "melanoma", "site": "back"}, "row 0")
    assert (named["diagnosis"], named["site"]) == ("melanoma", "posterior torso"), "names count before levels"
    assert normalise({**row, "diagnosis_3": "Lentigo simplex"}, "row 0")["diagnosis"] == "unknown"


@pytest.mark.parametrize(
    ("written", "age"), [("85+", 85.0), (" 85+ ", 85.0), (0.0, 0.0), ("45.0", 45.0), (130, 130.0)]
)
def test_age_is_a_number_of_years(written, age):
    assert normalise({"age": written}, "row 0")["age"] == age


def test_unknown_diagnosis_names_row_and_image():
    with pytest.raises(DataError, match=r"row 12 \(ISIC_9\): 'wart' is not a known class"):
        normalise({"isic_id": "ISIC_9", "dx": "wart"}, "row 12")


@pytest.mark.parametrize("age", ["old", -1, 200, "1e999", "84+"])
def test_impossible_age_is_refused(age):
    with pytest.raises(DataError, match=r"row 3: age .* is neither empty nor 0 to 130 years"):
        normalise({"age": age}, "row 3")


# --- properties ----------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.none(), st.sampled_from(["", "unknown", "NaN", "x 1", "IL_0000001"]), st.text(max_size=8)
)
DIAGNOSES = [None, "nv", "MEL", "Seborrheic keratosis", "unknown", "Squamous cell carcinoma, NOS"]
RECORDS = st.fixed_dictionaries(
    {
        "image": st.just({"bytes": b"encoded", "path": None}),
        "isic_id": st.sampled_from(["ISIC_0000001", "ISIC_0000002"]),
        "diagnosis": st.sampled_from(DIAGNOSES),
        "age": st.one_of(st.none(), st.integers(0, 130), st.sampled_from(["45", "45.0", "unknown"])),
        "sex": st.sampled_from([None, "male", "F", "Woman", "unknown", "other"]),
        "site": st.sampled_from([None, "trunk", "Head & neck", "left heel", "unknown"]),
        **dict.fromkeys(("lesion_id", "patient_id", "source", "license", "attribution"), WORDS),
    }
)


@given(RECORDS)
def test_a_normal_record_stays_what_it_is_also_through_a_file(record):
    normal = normalise(record, "row 0")
    assert set(normal) == set(FEATURES)
    assert normalise(normal, "row 0") == normal
    table = pyarrow.Table.from_pylist([normal], schema=FEATURES.arrow_schema)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    (read,) = pyarrow.parquet.read_table(io.BytesIO(sink.getvalue())).to_pylist()
    assert normalise(read, "row 0") == normal


def test_every_alias_is_its_column():
    values = {"age": 45, "diagnosis": "mel", "sex": "female", "site": "back"}
    for column, aliases in COLUMN_ALIASES.items():
        written = values.get(column, "word")
        expected = {"age": 45.0, "diagnosis": "melanoma", "site": "posterior torso"}.get(column, written)
        found = {alias: normalise({alias: written}, "row 0")[column] for alias in aliases}
        assert found == dict.fromkeys(aliases, expected)


@pytest.mark.parametrize(
    ("written", "sex"),
    [
        ("m", "male"),
        ("Male", "male"),
        ("man", "male"),
        ("F", "female"),
        ("woman", "female"),
        ("Other", "other"),
    ],
)
def test_words_for_sex(written, sex):
    assert normalise({"isic_id": "a", "sex": written}, "row 0")["sex"] == sex


def test_one_hot_columns_are_a_diagnosis():
    row = {"isic_id": "a", "MEL": "0.0", "NV": "0.0", "BCC": "1.0", "AKIEC": "0.0"}
    assert normalise(row, "row 0")["diagnosis"] == "basal_cell_carcinoma"
    with pytest.raises(
        DataError, match="row 0 .a.: NV and BCC are both 1, expected one diagnosis. Correct the row"
    ):
        normalise({**row, "NV": "1.0"}, "row 0")
