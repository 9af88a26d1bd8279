"""Names of diagnoses: what is recognised, what is refused, and what a label means to a model."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.models import diagnosis
from isic_vq.models.diagnosis import DIAGNOSES, canonical_diagnosis, resolve_label

HAM10000 = {
    "akiec": "actinic_keratosis",
    "bcc": "basal_cell_carcinoma",
    "bkl": "benign_keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "nevus",
    "vasc": "vascular_lesion",
}
ID2LABEL = {0: "melanoma", 1: "nevus", 2: "basal_cell_carcinoma"}


def test_order_is_that_of_isic_2019_followed_by_unknown():
    abbreviations = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
    assert tuple(map(canonical_diagnosis, abbreviations)) == DIAGNOSES


@pytest.mark.parametrize(("abbreviation", "name"), HAM10000.items())
def test_every_label_of_ham10000_is_known(abbreviation, name):
    assert canonical_diagnosis(abbreviation) == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("naevus", "nevus"),
        ("Seborrheic keratosis", "benign_keratosis"),
        ("solar lentigo", "benign_keratosis"),
        ("lichen planus-like keratosis", "benign_keratosis"),
        ("Solar or actinic keratosis", "actinic_keratosis"),
        ("Bowen's disease", "actinic_keratosis"),
        ("Malignant melanocytic proliferations (Melanoma)", "melanoma"),
        ("Benign soft tissue proliferations - Vascular", "vascular_lesion"),
    ],
)
def test_terms_of_the_isic_archive_are_known(spelling, name):
    assert canonical_diagnosis(spelling) == name


@given(st.sampled_from(DIAGNOSES), st.sampled_from([" ", "-", "_", "", "  "]), st.booleans())
def test_case_and_separators_do_not_matter(name, separator, upper):
    spelling = name.replace("_", separator)
    assert canonical_diagnosis(f" {spelling.upper() if upper else spelling.title()} ") == name


def test_no_spelling_means_two_diagnoses():
    spellings = [diagnosis._key(s) for names in diagnosis._ALIASES.values() for s in names]
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
