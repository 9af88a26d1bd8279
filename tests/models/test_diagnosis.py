"""Names of diagnoses: what is recognised, what is refused, and what a label means to a model."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.models import diagnosis
from isic_vq.models.diagnosis import (
    DIAGNOSES,
    archive_diagnosis,
    canonical_diagnosis,
    one_hot_diagnosis,
    resolve_label,
)

ID2LABEL = {0: "melanoma", 1: "nevus", 2: "basal_cell_carcinoma"}


def test_order_is_that_of_isic_2019_followed_by_unknown():
    abbreviations = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
    assert tuple(map(canonical_diagnosis, abbreviations)) == DIAGNOSES


@given(st.sampled_from(DIAGNOSES), st.sampled_from([" ", "-", "_", "", "  "]), st.booleans())
def test_case_and_separators_do_not_matter(name, separator, upper):
    spelling = name.replace("_", separator)
    assert canonical_diagnosis(f" {spelling.upper() if upper else spelling.title()} ") == name


def test_no_spelling_means_two_diagnoses():
    tables = (*diagnosis._ALIASES.values(), *diagnosis._NARROWER.values(), diagnosis._OTHER)
    spellings = [key for table in tables for key in diagnosis._keys(table)]
    spellings += map(diagnosis._key, DIAGNOSES)
    assert len(spellings) == len(set(spellings))


def test_unknown_name_is_refused_with_the_closest_names():
    with pytest.raises(
        ValueError, match=r"'melanom' is not a known diagnosis.*Did you mean melanoma\?.*nevus"
    ):
        canonical_diagnosis("melanom")


@pytest.mark.parametrize("name", ["", "  ", "benign", "3"])
def test_what_is_no_diagnosis_is_refused(name):
    with pytest.raises(ValueError, match="not a known diagnosis"):
        canonical_diagnosis(name)


@pytest.mark.parametrize("label", [1, "1", "nevus", "NV", "Naevus", np.int64(1)])
def test_label_resolves_by_id_name_alias_and_abbreviation(label):
    resolved = resolve_label(label, ID2LABEL)
    assert resolved == 1
    assert type(resolved) is int


def test_label_of_a_model_with_its_own_class_names_resolves_by_those_names():
    assert resolve_label("Cluster 7", {0: "cluster_6", 1: "cluster_7"}) == 1


def test_classes_named_by_abbreviations_resolve_by_full_names():
    assert resolve_label("melanoma", {0: "nv", 1: "mel"}) == 1


@pytest.mark.parametrize("label", [3, -1, "3", "scc", "unknown", "mole"])
def test_label_that_the_model_lacks_is_refused_with_its_classes(label):
    with pytest.raises(
        ValueError, match=f"label {label!r}.*0 = melanoma, 1 = nevus, 2 = basal_cell_carcinoma"
    ):
        resolve_label(label, ID2LABEL)


def test_error_for_an_abbreviation_tells_what_it_stands_for():
    with pytest.raises(ValueError, match=r"'scc' \(squamous_cell_carcinoma\)"):
        resolve_label("scc", ID2LABEL)


@pytest.mark.parametrize("label", [True, None, 1.0, ["nevus"]])
def test_label_of_another_type_is_refused(label):
    with pytest.raises(ValueError, match=f"is a {type(label).__name__}; give a class id or a name"):
        resolve_label(label, ID2LABEL)


def test_module_needs_the_standard_library_only():
    tree = ast.parse(Path(diagnosis.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


# --- as the sources write them, value by value ---------------------------------------------------------------------

HAM10000 = {
    "akiec": "actinic_keratosis",
    "bcc": "basal_cell_carcinoma",
    "bkl": "benign_keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "nevus",
    "vasc": "vascular_lesion",
}
ARCHIVE = {
    "naevus": "nevus",
    "Seborrheic keratosis": "benign_keratosis",
    "solar lentigo": "benign_keratosis",
    "lichen planus-like keratosis": "benign_keratosis",
    "Solar or actinic keratosis": "actinic_keratosis",
    "Bowen's disease": "actinic_keratosis",
    "Malignant melanocytic proliferations (Melanoma)": "melanoma",
    "Benign soft tissue proliferations - Vascular": "vascular_lesion",
}
SKIN_CANCER = {  # marmal88/skin_cancer
    "melanocytic_Nevi": "nevus",
    "melanoma": "melanoma",
    "benign_keratosis-like_lesions": "benign_keratosis",
    "basal_cell_carcinoma": "basal_cell_carcinoma",
    "actinic_keratoses": "actinic_keratosis",
    "vascular_lesions": "vascular_lesion",
    "dermatofibroma": "dermatofibroma",
}
CHALLENGE_2020 = {
    "nevus": "nevus",
    "melanoma": "melanoma",
    "seborrheic keratosis": "benign_keratosis",
    "lichenoid keratosis": "benign_keratosis",
    "solar lentigo": "benign_keratosis",
    "lentigo NOS": "unknown",
    "cafe-au-lait macule": "unknown",
    "atypical melanocytic proliferation": "unknown",
    "unknown": "unknown",
}
ARCHIVE_OF_OLD = {  # `diagnosis` of the archive's older metadata, all of its words; UDA-1 has nevus and melanoma
    "actinic keratosis": "actinic_keratosis",
    "acrochordon": "unknown",
    "adnexal tumor": "unknown",
    "AIMP": "unknown",
    "angiofibroma or fibrous papule": "unknown",
    "angiokeratoma": "vascular_lesion",
    "angioma": "vascular_lesion",
    "atypical melanocytic proliferation": "unknown",
    "atypical spitz tumor": "unknown",
    "basal cell carcinoma": "basal_cell_carcinoma",
    "cafe-au-lait macule": "unknown",
    "clear cell acanthoma": "benign_keratosis",
    "dermatofibroma": "dermatofibroma",
    "ephelis": "unknown",
    "epidermal nevus": "benign_keratosis",
    "lentigo NOS": "unknown",
    "lentigo simplex": "unknown",
    "lichenoid keratosis": "benign_keratosis",
    "melanoma": "melanoma",
    "melanoma metastasis": "melanoma",
    "merkel cell carcinoma": "unknown",
    "mucosal melanosis": "unknown",
    "neurofibroma": "unknown",
    "nevus": "nevus",
    "nevus spilus": "nevus",
    "other": "unknown",
    "pigmented benign keratosis": "benign_keratosis",
    "pyogenic granuloma": "vascular_lesion",
    "scar": "unknown",
    "sebaceous adenoma": "unknown",
    "sebaceous hyperplasia": "unknown",
    "seborrheic keratosis": "benign_keratosis",
    "solar lentigo": "benign_keratosis",
    "squamous cell carcinoma": "squamous_cell_carcinoma",
    "vascular lesion": "vascular_lesion",
    "verruca": "unknown",
}


@pytest.mark.parametrize("words", [HAM10000, ARCHIVE, SKIN_CANCER, CHALLENGE_2020, ARCHIVE_OF_OLD])
def test_words_of_the_sources(words):
    assert {word: canonical_diagnosis(word) for word in words} == words


def test_another_disease_is_no_name_to_ask_a_model_for():
    classes = dict(enumerate(DIAGNOSES))
    assert resolve_label("unknown", classes) == 8
    with pytest.raises(ValueError, match="'verruca' is not a class of this model"):
        resolve_label("verruca", classes)


ARCHIVE_LEVELS = [
    (["Malignant", "Malignant melanocytic proliferations (Melanoma)", "Melanoma, NOS"], "melanoma"),
    (["Malignant", "Malignant melanocytic proliferations (Melanoma)", "Melanoma metastasis"], "melanoma"),
    (["Benign", "Benign melanocytic proliferations", "Nevus", "Nevus, Spitz"], "nevus"),
    (
        [
            "Malignant",
            "Malignant adnexal epithelial proliferations - Follicular",
            "Basal cell carcinoma",
            "Basal cell carcinoma, Nodular",
        ],
        "basal_cell_carcinoma",
    ),
    (
        ["Indeterminate", "Indeterminate epidermal proliferations", "Solar or actinic keratosis"],
        "actinic_keratosis",
    ),
    (["Benign", "Benign epidermal proliferations", "Seborrheic keratosis"], "benign_keratosis"),
    (["Benign", "Benign epidermal proliferations", "Pigmented benign keratosis"], "benign_keratosis"),
    (["Benign", "Benign epidermal proliferations", "Clear cell acanthoma"], "benign_keratosis"),
    (
        ["Benign", "Benign soft tissue proliferations - Fibro-histiocytic", "Dermatofibroma"],
        "dermatofibroma",
    ),
    (["Benign", "Benign soft tissue proliferations - Vascular", "Angiokeratoma"], "vascular_lesion"),
    (
        ["Malignant", "Malignant epidermal proliferations", "Squamous cell carcinoma, Invasive"],
        "squamous_cell_carcinoma",
    ),
    (
        ["Malignant", "Malignant epidermal proliferations", "Squamous cell carcinoma in situ"],
        "squamous_cell_carcinoma",
    ),
    (
        [
            "Malignant",
            "Malignant epidermal proliferations",
            "Squamous cell carcinoma in situ",
            "Squamous cell carcinoma in situ, Bowens disease",
        ],
        "squamous_cell_carcinoma",
    ),
    (["Benign", "Benign melanocytic proliferations", "Nevus", "Nevus, Spilus"], "nevus"),
    (["Benign", "Benign epidermal proliferations", "Epidermal nevus"], "benign_keratosis"),
    (["Benign", "Benign soft tissue proliferations - Vascular", "Nevus anemicus"], "vascular_lesion"),
    (["Benign", "Benign melanocytic proliferations"], "unknown"),
    (["Indeterminate", "Indeterminate epidermal proliferations"], "unknown"),
    (["Malignant", "Malignant epidermal proliferations"], "unknown"),
    (
        ["Benign", "Nevus", "Melanoma in situ"],
        "melanoma",
    ),  # no such path is there: each level means a class
    (["Benign", None, None, None, None], "unknown"),
    (["Indeterminate"], "unknown"),
    ([None] * 5, "unknown"),
    ([], "unknown"),
]


def test_the_archive_s_most_specific_level_that_is_a_class_counts():
    assert [(levels, archive_diagnosis(levels)) for levels, _ in ARCHIVE_LEVELS] == ARCHIVE_LEVELS


NOT_GUESSED = [
    "Benign:Benign adnexal epithelial proliferations - Sebaceous:Nevus sebaceus",
    "Benign:Benign adnexal epithelial proliferations - Follicular:Nevus comedonicus",
    "Benign:Benign soft tissue proliferations - Adipocytic:Lipomatous nevus",
    "Benign:Benign melanocytic proliferations:Dermal melanocytosis:Nevus of Ota",
    "Benign:Benign melanocytic proliferations:Lentigo simplex",
    "Benign:Benign soft tissue proliferations - Fibro-histiocytic:Angiofibroma",
    "Benign:Flat melanotic pigmentations - not melanocytic nevus:Lentigo NOS",
    "Benign:Hemorrhagic lesions:Hemorrhage",
    "Indeterminate:Indeterminate melanocytic proliferations:Atypical Spitz tumor",
    "Indeterminate:Indeterminate melanocytic proliferations:Melanocytic tumor of uncertain malignant potential",
    "Malignant:Malignant adnexal epithelial proliferations - Follicular:Baso-squamous carcinoma",
    "Malignant:Malignant epidermal proliferations:Bowenoid papulosis",
    "Malignant:Malignant epidermal proliferations:Keratoacanthoma",
    "Malignant:Malignant soft tissue proliferations - Fibro-histiocytic:Dermatofibrosarcoma protuberans",
    "Malignant:Malignant soft tissue proliferations - Vascular:Angiosarcoma cutaneous",
    "Malignant:Collision - At least one malignant proliferation",
]


def test_what_sounds_like_a_class_of_the_archive_is_not_guessed():
    assert {path: archive_diagnosis(path.split(":")) for path in NOT_GUESSED} == dict.fromkeys(
        NOT_GUESSED, "unknown"
    )


ONE_HOT = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]


def test_the_column_with_a_one_is_the_diagnosis():
    for written in (float, lambda one: str(int(one))):
        rows = [{name: written(name == column) for name in ONE_HOT} for column in ONE_HOT]
        assert tuple(map(one_hot_diagnosis, rows)) == DIAGNOSES


def test_columns_of_2017_and_rows_without_a_one():
    row = {"melanoma": "0.0", "seborrheic_keratosis": "0.0"}
    assert one_hot_diagnosis(row) == "nevus"
    assert one_hot_diagnosis({**row, "melanoma": "1.0"}) == "melanoma"
    assert one_hot_diagnosis({**row, "seborrheic_keratosis": "1.0"}) == "benign_keratosis"
    assert one_hot_diagnosis(dict.fromkeys(ONE_HOT, 0)) == "unknown"
    assert one_hot_diagnosis({"diagnosis": "nv"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MEL": 1, "NV": 1}, "MEL and NV are both 1"),
        ({"NV": "yes"}, "NV is 'yes', expected 0 or 1"),
        ({"NV": 0.5}, "expected 0 or 1"),
    ],
)
def test_rows_that_are_not_one_hot_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        one_hot_diagnosis({**dict.fromkeys(ONE_HOT, 0), **changes})
