"""Folders described by tables that name images by id, and by the archive's JSON files."""

import csv
import json

import pytest

from isic_vq.data.schema import DataError
from isic_vq.data.sources import describe_source, find_source, open_source
from isic_vq.data.sources.folder import read_folder
from isic_vq.data.synthetic_images import synthetic_image


def _images(folder, *names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        synthetic_image(index, 0, size=16).save(folder / name)
    return folder


def _table(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _found(folder):
    return {row["isic_id"]: row["diagnosis"] for row in read_folder(folder)}


@pytest.mark.parametrize("column", ["isic_id", "image_id", "image_name", "image", "image_file"])
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_table_names_images_by_id_or_by_file(column, suffix, tmp_path):
    _images(tmp_path, "ISIC_0000001.png", "deep/ISIC_0000002.jpg", "ISIC_0000003.png")
    rows = [{column: f"ISIC_000000{number}{suffix}", "dx": dx} for number, dx in ((3, "mel"), (1, "bcc"))]
    _table(tmp_path / "GroundTruth.csv", *rows)
    records = {row["image"].rpartition("/")[2]: row["diagnosis"] for row in read_folder(tmp_path)}
    assert records == {
        "ISIC_0000001.png": "basal_cell_carcinoma",
        "ISIC_0000002.jpg": "unknown",
        "ISIC_0000003.png": "melanoma",
    }


def test_table_of_another_name_counts_if_it_is_the_only_one(tmp_path):
    _images(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.jsonl").write_text('{"image_id": "a", "dx": "nv"}\n')
    assert _found(tmp_path) == {"a": "nevus", "b": "unknown"}
    _table(tmp_path / "more.csv", {"image_id": "b", "dx": "mel"})
    with pytest.raises(
        DataError, match=r"has several tables \(labels.jsonl, more.csv\). Join them in one, metadata.csv"
    ):
        read_folder(tmp_path)
    _table(tmp_path / "metadata.csv", {"file_name": "a.png", "dx": "df"})
    assert _found(tmp_path) == {"a": "dermatofibroma", "b": "unknown"}


def test_id_of_two_files_and_of_none_is_refused(tmp_path):
    _images(tmp_path, "x/a.png", "y/a.png", "b.png")
    _table(tmp_path / "t.csv", {"image_id": "a", "dx": "mel"})
    with pytest.raises(
        DataError, match="t.csv, row 0: a may be x/a.png or y/a.png; name it in a column file_name"
    ):
        read_folder(tmp_path)
    _table(tmp_path / "t.csv", {"image_id": "b", "dx": "mel"}, {"image_id": "c", "dx": "mel"})
    with pytest.raises(
        DataError, match=r"t.csv names 1 image\(s\) that are not in the folder, for example c"
    ):
        read_folder(tmp_path)
    _table(tmp_path / "t.csv", {"image_id": "b", "dx": "mel"}, {"image_id": "b.png", "dx": "mel"})
    with pytest.raises(DataError, match="t.csv, row 1: b.png is named twice"):
        read_folder(tmp_path)
    _table(tmp_path / "t.csv", {"image_id": "", "dx": "mel"})
    with pytest.raises(
        DataError, match="t.csv, row 0: no image_id. Expected a column file_name, or one with the"
    ):
        read_folder(tmp_path)


def test_one_hot_tables_of_the_challenges_are_understood(tmp_path):
    _images(tmp_path, "a.jpg", "b.jpg", "nv/c.jpg", "d.jpg")
    columns = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    ones = {"a": "VASC", "b": "MEL", "c": None}
    rows = [
        {"image": name, **{column: float(column == one) for column in columns}} for name, one in ones.items()
    ]
    _table(tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv", *rows)
    assert _found(tmp_path) == {"a": "vascular_lesion", "b": "melanoma", "c": "nevus", "d": "unknown"}
    _table(tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv", {**rows[0], "MEL": 1})
    with pytest.raises(DataError, match=r"GroundTruth.csv, row 0 \(a\): "):
        read_folder(tmp_path)


def test_file_name_is_never_taken_for_an_id(tmp_path):
    _images(tmp_path, "a.png")
    _table(tmp_path / "metadata.csv", {"file_name": "a", "dx": "mel"})
    with pytest.raises(DataError, match="not in the folder, for example a"):
        read_folder(tmp_path)


V1 = {
    "_id": "5436e3b0",
    "name": "ISIC_0000045",
    "dataset": {"name": "UDA-1", "license": "CC-0", "_id": "1"},
    "meta": {
        "clinical": {"diagnosis": "nevus", "age_approx": 30, "sex": "male", "anatom_site_general": None},
        "acquisition": {"image_type": "dermoscopic", "pixelsX": 1504},
    },
}
V2 = {
    "isic_id": "ISIC_0000080",
    "copyright_license": "CC-BY",
    "attribution": "Somebody",
    "public": True,
    "files": {"full": {"url": "https://example.org", "size": 1}},
    "metadata": {
        "clinical": {"lesion_id": "IL_1", "patient_id": "IP_1", "age_approx": 45, "sex": "female"}
        | {"diagnosis_1": "Malignant", "diagnosis_2": "Malignant melanocytic proliferations (Melanoma)"}
        | {"diagnosis_3": "Melanoma in situ", "diagnosis_4": None},
        "acquisition": {"pixels_x": 3},
    },
}
FLAT = {"dx": "mel", "license": "CC0-1.0"}


def test_json_beside_an_image_describes_it(tmp_path):
    _images(tmp_path, "a.jpg", "sub/b.png", "c.png", "nv/d.png")
    for name, content in (("a", V1), ("sub/b", V2), ("c", FLAT), ("annotations", {"dx": "wart"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    rows = {row.pop("image").rpartition("/")[2][0]: row for row in read_folder(tmp_path)}
    nothing = dict.fromkeys(rows["a"])
    assert rows == {
        "a": nothing
        | {"isic_id": "ISIC_0000045", "diagnosis": "nevus", "age": 30.0, "sex": "male"}
        | {"source": "UDA-1", "license": "CC-0"},
        "b": nothing
        | {"isic_id": "ISIC_0000080", "lesion_id": "IL_1", "patient_id": "IP_1", "age": 45.0, "sex": "female"}
        | {"license": "CC-BY", "attribution": "Somebody", "diagnosis": "melanoma"},
        "c": nothing | {"isic_id": "c", "diagnosis": "melanoma", "license": "CC0-1.0"},
        "d": nothing | {"isic_id": "d", "diagnosis": "nevus"},
    }


def test_row_of_the_table_goes_before_the_json(tmp_path):
    _images(tmp_path, "a.png")
    (tmp_path / "a.json").write_text(json.dumps(V1))
    _table(tmp_path / "metadata.csv", {"file_name": "a.png", "dx": "bkl"})
    (row,) = read_folder(tmp_path)
    assert (row["isic_id"], row["diagnosis"], row["age"]) == ("a", "benign_keratosis", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "sub/a.json is a list; expected one JSON object"),
        (b"{", "sub/a.json is not JSON"),
        (b"\xff", "sub/a.json is not JSON"),
        (b'{"dx": "wart"}', r"sub/a.json \(a\): 'wart' is not a known class"),
    ],
)
def test_unusable_json_beside_an_image_is_named(content, message, tmp_path):
    _images(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)


def test_fingerprint_covers_the_table_and_the_json_files(tmp_path):
    _images(tmp_path, "a.png", "b.png")
    prints = []
    for name, content in (
        ("notes.md", "no description"),
        ("a.json", '{"dx": "nv"}'),
        ("a.json", '{"dx": "mel"}'),
        ("truth.csv", "image_id,dx\nb,nv\n"),
        ("truth.csv", "image_id,dx\nb,mel\n"),
        ("c.json", '{"dx": "nv"}'),  # no image beside it
    ):
        (tmp_path / name).write_text(content)
        prints.append(describe_source(str(tmp_path)).fingerprint)
    assert len(set(prints)) == 5
    assert prints[-1] == prints[-2]


@pytest.mark.real_data
def test_archive_files_carry_what_the_archive_says(data_dir):
    info = describe_source("folder:${ISIC_VQ_DATA}/raw")
    assert info.num_images == 12
    rows = {row["isic_id"]: row for row in find_source("folder:${ISIC_VQ_DATA}/raw").metadata()}
    for path in sorted((data_dir / "raw").glob("*.json")):
        said = json.loads(path.read_text())["meta"]["clinical"]
        row = rows[path.stem]
        assert (row["age"], row["sex"]) == (said["age_approx"], said["sex"])
        assert row["diagnosis"] == said["diagnosis"]
    assert len(open_source("folder:${ISIC_VQ_DATA}/raw")) == len(rows)
