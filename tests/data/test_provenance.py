"""What weights were trained on travels with them, and decides their licence."""

import dataclasses
import json

import pytest

from isic_vq.data.licenses import license_id, weights_license
from isic_vq.data.provenance import TRAINING_DATA, licenses_of, read_training_data, write_training_data
from isic_vq.data.schema import DataError
from isic_vq.data.sources import describe_source


@pytest.fixture
def info():
    return dataclasses.replace(describe_source("synthetic:4:0"), snapshot="2026-08-21")


def test_round_trip(info, tmp_path):
    data = {"vqvae": None, "prior": info}
    write_training_data(tmp_path, data)
    assert read_training_data(tmp_path) == data
    assert info.ids_sha256


def test_a_repository_s_provenance_says_it_too(info, tmp_path):
    content = {"training_data_by_stage": {"vqvae": dataclasses.asdict(info)}}
    (tmp_path / "provenance.json").write_text(json.dumps(content))
    assert read_training_data(tmp_path) == {"vqvae": info}


def test_nothing_recorded_is_nothing_assumed(tmp_path):
    assert read_training_data(tmp_path) == {}
    (tmp_path / "provenance.json").write_text("{}")
    assert read_training_data(tmp_path) == {}
    assert licenses_of({"vqvae": None, "prior": {"licenses": {"CC-0": 3}}}) == {"unknown", "CC-0"}


def test_a_damaged_record_is_an_error(tmp_path):
    for text in ("{", '{"vqvae": {"colour": 1}}', "[]"):
        (tmp_path / TRAINING_DATA).write_text(text)
        with pytest.raises(DataError, match="training_data.json is damaged .*: train again"):
            read_training_data(tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "prior", "expected"),
    [
        ("CC-0", "CC0-1.0", "cc0-1.0"),
        ("CC-BY-NC-4.0", "CC-0", "cc-by-nc-4.0"),
        ("CC-0", "CC BY 4.0", "cc-by-4.0"),
        (None, "CC-0", "unknown"),
        (None, "CC-BY-NC", "unknown"),
    ],
)
def test_weights_are_under_the_most_restrictive_licence_of_all_their_images(tokenizer, prior, expected):
    stages = {"vqvae": tokenizer and {"licenses": {tokenizer: 1}}, "prior": {"licenses": {prior: 2}}}
    assert weights_license(licenses_of(stages)) == expected


def test_a_licence_has_one_id_however_it_is_spelled():
    expected = {
        "CC-0": "cc0-1.0",
        "CC0": "cc0-1.0",
        "CC0-1.0": "cc0-1.0",
        "public domain": "cc0-1.0",
        "CC-BY": "cc-by-4.0",
        "CC BY 4.0": "cc-by-4.0",
        "CC-BY-NC": "cc-by-nc-4.0",
        "cc-by-nc-4.0": "cc-by-nc-4.0",
        None: "unknown",
        "": "unknown",
    }
    assert {spelled: license_id(spelled) for spelled in expected} == expected


@pytest.mark.parametrize("other", ["MIT", "CC-BY-SA", "CC-BY-ND", "all rights reserved"])
def test_other_licences_are_refused_rather_than_guessed(other):
    with pytest.raises(ValueError, match="expected CC-0, CC-BY or CC-BY-NC, ISIC's licences"):
        license_id(other)


def test_weights_of_no_images_have_no_licence():
    with pytest.raises(ValueError, match="weights of no images have no licence"):
        weights_license([])
