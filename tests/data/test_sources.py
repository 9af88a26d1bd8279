"""Sources: every URI gives the same columns, streaming or not; errors tell the way out; names tell no machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from isic_vq.data.schema import DataError
from isic_vq.data.sites import canonical_site
from isic_vq.data.sources import SourceInfo, describe_source, find_source, open_source
from isic_vq.data.synthetic_images import synthetic_image, synthetic_metadata, synthetic_record
from isic_vq.data.uri import set_name
from source_contract import CONTRACT, rows_of


def _write_parquet(path, first, last, seed=0):
    """Write synthetic records `first` to `last` - 1 under the column names of HAM10000."""
    records = [synthetic_record(index, seed) for index in range(first, last)]
    rows = [{("dx" if k == "diagnosis" else k): v for k, v in record.items()} for record in records]
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


@pytest.fixture
def parquet_dir(tmp_path):
    _write_parquet(tmp_path / "shards" / "train-0.parquet", 0, 5)
    _write_parquet(tmp_path / "shards" / "train-1.parquet", 5, 9)
    return tmp_path / "shards"


@pytest.mark.parametrize("holds", CONTRACT)
@pytest.mark.parametrize("kind", ["parquet", "folder", "synthetic"])
def test_every_local_source_keeps_the_contract(kind, holds, parquet_dir, image_folder, monkeypatch):
    monkeypatch.setattr("isic_vq.data.sources.folder.FILES_PER_PART", 5)
    uri = {
        "parquet": f"parquet:{parquet_dir}",
        "folder": f"folder:{image_folder}",
        "synthetic": "synthetic:40:3",
    }[kind]
    assert len(find_source(uri).parts()) > 2
    holds(find_source(uri))


def test_parquet_rows_come_in_the_order_of_the_files_names(parquet_dir):
    expected = [
        {**record, "image": record["image"]["bytes"], "site": canonical_site(record["site"])}
        for record in (synthetic_record(index, seed=0) for index in range(9))
    ]
    assert rows_of(open_source(f"parquet:{parquet_dir}/train-*.parquet")) == expected


def test_folder_rows_carry_the_metadata_and_the_images(image_folder):
    for index, record in enumerate(open_source(f"folder:{image_folder}")):
        picture = record.pop("image")
        assert picture.tobytes() == synthetic_image(index, seed=0, size=48).tobytes()
        expected = synthetic_metadata(index, seed=0)
        assert record == {**expected, "site": canonical_site(expected["site"])}


@pytest.mark.parametrize(
    "as_uri", [lambda d: f"parquet:{d}", str, lambda d: f"{d}/*.parquet", lambda d: f"{d}/**/*-?.parquet"]
)
def test_parquet_is_found_by_directory_path_and_pattern(as_uri, parquet_dir):
    assert open_source(as_uri(parquet_dir)).num_rows == 9


def test_bare_path_of_a_file_or_folder_needs_no_scheme(parquet_dir, image_folder):
    assert open_source(str(parquet_dir / "train-1.parquet")).num_rows == 4
    assert open_source(str(image_folder)).num_rows == 16


def test_archive_needs_no_filters_and_no_colon():
    whole = find_source("isic-archive")
    assert whole == find_source("isic-archive:")
    assert type(whole).__name__ == "ArchiveSource"
    assert type(find_source("challenge:2018")).__name__ == "ChallengeSource"


def test_brackets_in_a_path_are_not_a_pattern(tmp_path):
    path = _write_parquet(tmp_path / "odd [1] name" / "a.parquet", 0, 3)
    assert rows_of(open_source(str(path))) == rows_of(open_source(str(path), streaming=True))


def test_rewritten_file_is_read_again(tmp_path):
    path = _write_parquet(tmp_path / "a.parquet", 0, 3)
    assert open_source(str(path)).num_rows == 3
    _write_parquet(path, 0, 5)
    assert open_source(str(path)).num_rows == 5


def test_class_label_columns_and_plain_bytes_are_understood(tmp_path):
    features = Features(
        {"image": Value("binary"), "label": ClassLabel(names=["NV", "MEL"]), "isic_id": Value("string")}
    )
    data = [record["image"]["bytes"] for record in (synthetic_record(index, 0) for index in range(2))]
    Dataset.from_dict({"image": data, "label": [1, 0], "isic_id": ["a", "b"]}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    for streaming in (False, True):
        rows = list(open_source(str(tmp_path / "a.parquet"), streaming))
        assert [row["diagnosis"] for row in rows] == ["melanoma", "nevus"]
        assert rows[0]["image"].tobytes() == synthetic_image(0, seed=0).tobytes()


def test_stream_does_not_take_images_from_the_working_directory(parquet_dir, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    synthetic_image(99, seed=9).save(tmp_path / "cwd" / "SYNTHETIC_0_0000000.png")
    monkeypatch.chdir(tmp_path / "cwd")
    record = next(iter(open_source(f"parquet:{parquet_dir}", streaming=True)))
    assert record["image"].tobytes() == synthetic_image(0, seed=0).tobytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_row_without_an_image_has_none(streaming, tmp_path):
    records = [
        {"image": image, "isic_id": "a"}
        for image in (None, {"bytes": None, "path": None}, {"bytes": b"x", "path": ""})
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    stored = [
        row["image"]
        for row in open_source(str(tmp_path), streaming).cast_column("image", Image(decode=False))
    ]
    assert [image and image["bytes"] for image in stored] == [None, None, b"x"]


def test_stream_resumes_at_the_next_row(parquet_dir):
    stream = open_source(f"parquet:{parquet_dir}", streaming=True)
    iterator = iter(stream)
    for _ in range(6):
        next(iterator)
    state = stream.state_dict()
    expected = [row["isic_id"] for row in iterator]
    resumed = open_source(f"parquet:{parquet_dir}", streaming=True)
    resumed.load_state_dict(state)
    assert [row["isic_id"] for row in resumed] == expected
    assert len(expected) == 3


def test_process_that_leaves_a_stream_early_ends(parquet_dir):
    code = f"from isic_vq.data.sources import open_source; print(next(iter(open_source({str(parquet_dir)!r}, True)))['sex'])"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def test_metadata_may_be_jsonl_with_nested_names_and_other_columns(tmp_path):
    (tmp_path / "deep").mkdir()
    synthetic_image(0, 0, size=32).save(tmp_path / "deep" / "a.png")
    row = {
        "file_name": "deep/a.png",
        "dx": "bcc",
        "age_approx": 50,
        "localization": "ear",
        "image": "a",
        "extra": 1,
    }
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    record = open_source(f"folder:{tmp_path}")[0]
    assert (record["diagnosis"], record["age"], record["site"]) == ("basal_cell_carcinoma", 50.0, "head/neck")


def test_class_folder_of_an_unknown_name_stops(tmp_path):
    for name in (
        "MEL/a.jpg",
        "Nevus/batch 2/b.PNG",
        "127.0.0.1 data/c.png",
        "d.png",
        ".hidden/e.png",
        "MEL/._a.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        synthetic_image(0, 0, size=32).save(tmp_path / name)
    with pytest.raises(DataError, match=r"'127.0.0.1 data' \(1 image\) is not a known class"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "127.0.0.1 data").rename(tmp_path / ".hidden" / "data")
    dataset = open_source(f"folder:{tmp_path}")
    found = dict(zip(dataset["isic_id"], dataset["diagnosis"], strict=True))
    assert found == {"a": "melanoma", "b": "nevus", "d": "unknown"}


def test_same_file_name_in_two_folders_gives_two_ids(tmp_path):
    for name in ("mel/1.png", "nv/1.png", "nv/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        synthetic_image(0, 0, size=32).save(tmp_path / name)
    assert open_source(f"folder:{tmp_path}")["isic_id"][:] == ["mel/1.png", "nv/1.png", "2"]


def test_variables_are_replaced_and_kept_in_the_name(parquet_dir, monkeypatch):
    monkeypatch.setenv("SOME_DATA", str(parquet_dir.parent))
    for form in ("$SOME_DATA", "${SOME_DATA}"):
        info = describe_source(f"parquet:{form}/shards/train-*.parquet")
        assert info.name == f"parquet:{form}/shards/train-*.parquet"
        assert info.num_images == 9


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "parquet:{tmp}/none-*.parquet",
            r"Nothing matches parquet:none-\*.parquet: expected a file, directory",
        ),
        ("{tmp}/none", "Nothing matches parquet:none"),
        ("folder:{tmp}/none", "folder:none is not a directory"),
        ("folder:{tmp}", "No images in the folder .* Parquet files are read with parquet:PATTERN"),
        ("${UNSET_VARIABLE}/a", "needs the environment variable UNSET_VARIABLE: set it to a folder"),
        ("hf://datasets/a/b", "unknown scheme 'hf'. Expected .*parquet:PATTERN, folder:DIR"),
        ("https://example.org/a.zip", "unknown scheme 'https'. Expected .*webdataset:PATTERN"),
        ("synthetic:0", "with NUM from 1 to 9999999"),
        (f"synthetic:{10**30}", "with NUM from 1 to 9999999"),
        ("synthetic:many", "with NUM from 1 to 9999999"),
        ("parquet:", "names nothing"),
        ("", "names nothing"),
    ],
)
def test_what_cannot_be_opened_tells_the_way_out(uri, message, streaming, tmp_path):
    with pytest.raises(DataError, match=message):
        open_source(uri.replace("{tmp}", str(tmp_path)), streaming)


def test_directory_with_several_splits_is_refused(tmp_path):
    _write_parquet(tmp_path / "train-0.parquet", 0, 2)
    _write_parquet(tmp_path / "validation-0.parquet", 2, 4)
    with pytest.raises(DataError, match=r"several splits \(train, val\). Name one by a pattern"):
        open_source(str(tmp_path))


def test_unreadable_and_imageless_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="a.parquet is not a readable parquet file"):
        open_source(str(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"img": [b""], "dx": ["nv"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has no column image, only img, dx"):
        open_source(str(tmp_path))


def test_files_with_different_columns_are_refused(tmp_path):
    _write_parquet(tmp_path / "a.parquet", 0, 2)
    pyarrow.parquet.write_table(pyarrow.table({"image": [b""]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="different columns.*open them separately"):
        open_source(f"parquet:{tmp_path}/*.parquet")


def test_parquet_without_rows_is_refused(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), tmp_path / "a.parquet"
    )
    for streaming in (False, True):
        with pytest.raises(DataError, match="has no rows"):
            open_source(str(tmp_path), streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_diagnosis_names_the_row(streaming, tmp_path):
    rows = [{"image": b"", "isic_id": f"ISIC_{i}", "dx": dx} for i, dx in enumerate(["nv", "mel", "wart"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"'wart' .*is not a known class.*row 2 \(ISIC_2\)|row 2 \(ISIC_2\): 'wart' is not"
    ):
        rows_of(open_source(str(tmp_path), streaming))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "file_name,dx\n000.png,nv\n999.png,nv\n",
            r"metadata.csv names 1 image\(s\) that are not in the folder, for example 999.png",
        ),
        (
            "file_name,dx\n000.png,wart\n",
            r"'wart' \(1 image\) is not a known class.* The first is in metadata.csv, row 0 \(000\)",
        ),
        ("file_name,dx\n000.png,nv\n000.png,mel\n", "row 1: 000.png is named twice"),
        ("name,dx\n000.png,nv\n", "row 0: no file_name. Expected a column file_name"),
    ],
)
def test_unusable_metadata_is_refused(content, message, image_folder):
    (image_folder / "metadata.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(str(image_folder))


def test_broken_jsonl_and_two_metadata_files_are_refused(image_folder):
    (image_folder / "metadata.jsonl").write_text('{"file_name": "000.png"}\n{"file_name"\n')
    with pytest.raises(DataError, match="keep one of them"):
        open_source(str(image_folder))
    (image_folder / "metadata.csv").unlink()
    with pytest.raises(DataError, match="metadata.jsonl, line 2 is not JSON"):
        open_source(str(image_folder))


def test_synthetic_source_is_described():
    info = describe_source("synthetic:10")
    assert info.name == "synthetic:10:0"
    assert (info.num_images, info.licenses, info.attributions) == (
        10,
        {"CC0-1.0": 10},
        ["isic-vq synthetic images"],
    )
    assert info.diagnoses["melanoma"] == info.diagnoses["nevus"] == 2
    assert sum(info.diagnoses.values()) == 10


def test_description_tells_no_path(parquet_dir, image_folder):
    for uri, name in ((f"parquet:{parquet_dir}", "parquet:shards"), (str(image_folder), "folder:images")):
        info = describe_source(uri)
        assert info.name == name
        assert str(Path.home()) not in repr(info)
        assert str(parquet_dir.parent) not in repr(info)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_fingerprint_follows_content_and_not_location(kind, parquet_dir, image_folder, tmp_path):
    source = parquet_dir if kind == "parquet" else image_folder
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(source, copy)
    before, moved = describe_source(str(source)), describe_source(str(copy))
    assert moved == SourceInfo(**{**vars(before), "name": moved.name})
    if kind == "parquet":
        _write_parquet(copy / "train-1.parquet", 5, 9, seed=1)
    else:
        synthetic_image(99, seed=0, size=48).save(copy / "000.png")
    assert describe_source(str(copy)).fingerprint != before.fingerprint


def test_fingerprint_of_a_folder_sees_names_and_metadata(image_folder):
    prints = [describe_source(str(image_folder)).fingerprint]
    text = (image_folder / "metadata.csv").read_text()
    (image_folder / "metadata.csv").write_text(text.replace("female", "male"))
    prints.append(describe_source(str(image_folder)).fingerprint)
    (image_folder / "metadata.csv").write_text(text.replace("000.png", "zzz.png"))
    (image_folder / "000.png").rename(image_folder / "zzz.png")
    prints.append(describe_source(str(image_folder)).fingerprint)
    assert len(set(prints)) == 3


@pytest.mark.real_data
def test_real_sources_have_the_images_and_classes_they_should(data_dir):
    infos = {
        name: describe_source(f"parquet:${{ISIC_VQ_DATA}}/{name}-*.parquet")
        for name in ("ham10000/train", "ham10000/validation", "uda1/test")
    }
    assert [info.num_images for info in infos.values()] == [5387, 597, 555]
    train, validation = infos["ham10000/train"], infos["ham10000/validation"]
    both = {name: train.diagnoses[name] + validation.diagnoses[name] for name in train.diagnoses}
    assert both == {
        "actinic_keratosis": 183,
        "basal_cell_carcinoma": 264,
        "benign_keratosis": 583,
        "dermatofibroma": 60,
        "melanoma": 491,
        "nevus": 4323,
        "vascular_lesion": 80,
    }
    assert infos["uda1/test"].diagnoses == {"melanoma": 158, "nevus": 395, "unknown": 2}
    assert train.licenses == {"CC-BY-NC-4.0": 5387}
    assert infos["uda1/test"].licenses == {"CC0-1.0": 555}
    assert len({info.fingerprint for info in infos.values()}) == 3
    assert str(data_dir) not in repr(infos)


@pytest.mark.real_data
def test_no_lesion_of_ham10000_is_in_training_and_validation(data_dir):
    train, validation = (
        open_source(f"{data_dir}/ham10000/{split}-*.parquet") for split in ("train", "validation")
    )
    assert not set(train["lesion_id"]) & set(validation["lesion_id"])
    assert not set(train["isic_id"]) & set(validation["isic_id"])


@pytest.mark.real_data
def test_real_stream_equals_the_data_set(data_dir):
    uri = "parquet:${ISIC_VQ_DATA}/uda1/*.parquet"
    assert rows_of(open_source(uri)) == rows_of(open_source(uri, streaming=True))


@pytest.mark.real_data
def test_rows_carry_their_own_image(data_dir):
    dataset = open_source("${ISIC_VQ_DATA}/ham10000/validation-*.parquet")
    for record in dataset.cast_column("image", Image(decode=False)):
        assert record["image"]["path"] == f"{record['isic_id']}.jpg"


@pytest.mark.real_data
def test_untouched_archive_files_open_as_a_folder(data_dir):
    dataset = open_source("${ISIC_VQ_DATA}/raw")
    assert dataset.num_rows == 12
    assert all(name.startswith("ISIC_") for name in dataset["isic_id"])


def test_a_set_without_a_name_is_called_by_its_source():
    called = {
        "folder:data/my_test_images": "my_test_images",
        "photos/": "photos",
        "folder:data/test": "test",
        "folder:train/clinic": "clinic",
        "folder:test_2024.v1": "test_2024-v1",
        "prepared:ham:validation": "validation",
        "challenge:2018:test": "test",
        "challenge:2018": "challenge-2018",
        "hub:me/moles@v1": "moles-v1",
        "hub:me/moles?diagnosis=kind&split=test": "test",
        "parquet:${DATA}/uda1/test-*.parquet": "test",
        "parquet:skin/*.parquet": "skin",
        "parquet:codes/clinic.parquet": "clinic",
        "webdataset:https://example.org/shards/a-{000..009}.tar": "shards",
        "synthetic:40:3": "synthetic-40-3",
        "parquet:*.parquet": "images",
    }
    assert {uri: set_name(uri) for uri in called} == called


def test_sets_of_one_name_are_refused(run):
    code, _, stderr = run("evaluate", "--data", "synthetic:1", "--data", "synthetic:1", "--only", "utility")
    assert code == 1
    assert (
        "data sets are called synthetic-1, synthetic-1: name each differently, --data NAME=SOURCE" in stderr
    )
