"""Preparing images: what is in the folder, and that nothing but sources and settings decides a byte of it."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pyarrow.parquet
import pytest
from datasets import load_dataset
from PIL import Image

from isic_vq.data import prepare as preparing
from isic_vq.data.prepare import Preparation, prepare
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources import find_source
from isic_vq.data.sources.manifest import IMAGES, MANIFEST, Manifest, read_images
from isic_vq.data.synthetic_images import synthetic_image
from isic_vq.data.verify import verify
from source_contract import (
    assert_metadata_are_the_rows_without_images,
    assert_pickled_source_reads_the_same,
    assert_processes_share_the_rows,
    assert_stream_equals_the_data_set,
    assert_stream_resumes_exactly,
    rows_of,
)

SMALL = Preparation(size=32, rows_per_shard=10)


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_folder(folder, rows, size=96):
    """Images by (file, number of the synthetic image, how it was changed) with a table of the other columns."""
    folder.mkdir(parents=True)
    columns = ["file_name", "lesion_id", "patient_id", "diagnosis", "license", "attribution"]
    lines = [",".join(columns)]
    for name, number, change, *values in rows:
        picture = synthetic_image(number, 0, size=size)
        if change == "flipped":
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if change == "resized":
            picture = picture.resize((70, 70), Image.Resampling.BICUBIC)
        picture.save(folder / name, quality=60 if change == "recompressed" else 95)
        lines.append(",".join([name, *values]))
    (folder / "metadata.csv").write_text("\n".join(lines))
    return f"folder:{folder}"


@pytest.fixture
def sources(tmp_path):
    """Sixty images of forty lesions, ten more that are for testing, and copies of validation images."""
    first = [
        (
            f"a{i:02}.jpg",
            i,
            None,
            f"L{i % 40}",
            "",
            ("nv", "mel", "bkl")[i % 3],
            ("CC-0", "CC-BY")[i % 2],
            f"Clinic {i % 2}",
        )
        for i in range(60)
    ]
    tests = [(f"t{i}.jpg", 100 + i, None, f"T{i}", "", "nv", "CC-BY-NC", "Clinic T") for i in range(10)]
    return [
        (None, write_folder(tmp_path / "first", first)),
        ("test", write_folder(tmp_path / "tests", tests)),
    ]


@pytest.fixture
def prepared(tmp_path, sources):
    prepare(tmp_path / "out", sources, SMALL)
    return tmp_path / "out"


def test_every_image_is_in_one_shard_at_its_size_with_its_row(prepared, sources):
    rows = read_images(prepared)
    assert len(rows) == 70
    shards = {
        path.name: pyarrow.parquet.read_table(path).to_pylist() for path in prepared.glob("*-*.parquet")
    }
    assert sum(map(len, shards.values())) == 70
    for row in rows:
        stored = shards[row["shard"]][row["row"]]
        assert {name: stored[name] for name in FEATURES if name != "image"} == {
            n: row[n] for n in FEATURES if n != "image"
        }
        picture = Image.open(io.BytesIO(stored["image"]["bytes"]))
        assert (picture.size, picture.format) == ((32, 32), "JPEG")
        number = int(row["isic_id"][1:]) + (100 if row["isic_id"][0] == "t" else 0)
        expected = synthetic_image(number, 0, size=96).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(picture, float) - np.asarray(expected, float)).mean() < 4
    by_lesion = {}
    for row in rows:
        assert by_lesion.setdefault(row["lesion_id"], row["split"]) == row["split"]
        assert row["isic_id"][0] != "t" or row["split"] == "test"
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


def test_the_manifest_says_what_the_files_are(prepared):
    manifest = json.loads((prepared / MANIFEST).read_text())
    rows = read_images(prepared)
    for split, about in manifest["splits"].items():
        own = [row for row in rows if row["split"] == split]
        assert about["num_images"] == len(own)
        assert sum(about["diagnoses"].values()) == sum(about["licenses"].values()) == len(own)
        assert about["attributions"] == sorted({row["attribution"] for row in own})
        ids = "\n".join(sorted(row["isic_id"] for row in own))
        assert about["ids_sha256"] == hashlib.sha256(ids.encode()).hexdigest()
    strata = {(s["column"], s["value"], s["split"]): s for s in manifest["strata"]}
    nevi = [row["split"] for row in rows if row["diagnosis"] == "nevus"]
    for split in ("train", "validation", "test"):
        stratum, size = strata["diagnosis", "nevus", split], manifest["splits"][split]["num_images"]
        assert stratum["num_images"] == nevi.count(split)
        assert stratum["share"] == pytest.approx(nevi.count(split) / size)
        assert stratum["deviation"] == pytest.approx(nevi.count(split) / size - len(nevi) / len(rows))
    for shard in manifest["shards"]:
        content = (prepared / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    for row in rows:
        assert len(row["sha256"]) == 64
    original = next(row for row in rows if row["isic_id"] == "a07")
    folder = prepared.parent / "first" / "a07.jpg"
    assert original["sha256"] == hashlib.sha256(folder.read_bytes()).hexdigest(), (
        "of the file as the source has it"
    )
    assert [s["name"] for s in manifest["sources"]] == ["folder:first", "folder:tests"]
    assert str(prepared.parent) not in (prepared / MANIFEST).read_text()
    assert not (prepared / ".work").exists()
    assert verify(prepared) == []


def test_datasets_reads_the_shards_as_images(prepared, tmp_path):
    files = str(prepared / "train-*.parquet")
    found = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found[0]["image"].size == (32, 32)


@pytest.mark.slow
def test_the_number_of_workers_decides_no_byte(prepared, sources, tmp_path):
    prepare(tmp_path / "several", sources, SMALL, workers=2)
    assert digests(tmp_path / "several") == digests(prepared)


def _prepare_slowly(output, sources):
    make = preparing._make_unit

    def slowly(*arguments):
        time.sleep(0.15)
        return make(*arguments)

    preparing._make_unit = slowly
    prepare(output, sources, SMALL)


def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(prepared, sources, tmp_path, monkeypatch):
    monkeypatch.setattr("isic_vq.data.sources.folder.FILES_PER_PART", 8)
    out = tmp_path / "killed"
    for least in (2, 5):
        child = multiprocessing.get_context("fork").Process(target=_prepare_slowly, args=(out, sources))
        child.start()
        until = time.monotonic() + 60
        while len(list((out / ".work").glob("*.parquet"))) < least:
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert not (out / MANIFEST).exists()
        with pytest.raises(DataError, match="has no manifest.json: isic-vq data prepare writes it last"):
            Manifest.read(out)
    done = {path.name: path.stat().st_mtime_ns for path in (out / ".work").glob("*.parquet")}
    made = []
    make = preparing._make_unit
    monkeypatch.setattr(preparing, "_make_unit", lambda *a: made.append(a[2].name) or make(*a))
    prepare(out, sources, SMALL)
    assert len(done) >= 5
    assert not set(made) & set(done), "what was finished is not made again"
    assert digests(out) == digests(prepared)


def test_ctrl_c_keeps_what_is_finished(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("isic_vq.data.sources.folder.FILES_PER_PART", 8)
    make, made = preparing._make_unit, []

    def interrupted(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return make(*arguments)

    monkeypatch.setattr(preparing, "_make_unit", interrupted)
    with pytest.raises(KeyboardInterrupt, match="3 of 10 parts are finished; run the same command to resume"):
        prepare(tmp_path / "out", sources, SMALL)


def test_the_same_command_on_a_finished_folder_changes_nothing(prepared, sources):
    before = digests(prepared)
    prepare(prepared, sources, SMALL)
    assert digests(prepared) == before


def test_other_settings_are_refused(prepared, sources, tmp_path):
    with pytest.raises(
        DataError,
        match=r"out was prepared with other settings \(size = 32, and this is 48\)",
    ):
        prepare(prepared, sources, Preparation(size=48, rows_per_shard=10))
    with pytest.raises(
        DataError,
        match=r"other settings \(sources.1.split = .*\): choose another, or --extend it",
    ):
        prepare(prepared, sources[:1], SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(
        DataError,
        match="full holds mine.txt: choose an empty folder",
    ):
        prepare(tmp_path / "full", sources, SMALL)


def test_a_begun_folder_is_not_gone_on_with_otherwise(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_make_units", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", sources, SMALL)
    with pytest.raises(
        DataError,
        match=r"out/.work was begun with quality = 95, and this is 90: resume it with the same",
    ):
        prepare(tmp_path / "out", sources, Preparation(size=32, rows_per_shard=10, quality=90))


# --- duplicates and damaged images ---------------------------------------------------------------------------------


def test_planted_copies_of_validation_images_leave_the_training_set(prepared, sources, tmp_path):
    rows = read_images(prepared)
    shown = [row for row in rows if row["split"] in ("validation", "test")]
    changes = ["recompressed", "resized", "flipped"]
    copies = []
    for i, row in enumerate(shown):
        number = int(row["isic_id"][1:]) + (100 if row["isic_id"][0] == "t" else 0)
        copies.append((f"copy{i}.jpg", number, changes[i % 3], f"C{i}", "", "nv", "CC-0", "Thief"))
    planted = ("train", write_folder(tmp_path / "planted", copies))
    manifest = prepare(tmp_path / "clean", [*sources, planted], SMALL)
    found = {
        row["isic_id"]: row for row in read_images(tmp_path / "clean") if row["origin"] == "folder:planted"
    }
    assert len(found) == len(shown) >= 12
    for i, row in enumerate(shown):
        copy = found[f"copy{i}"]
        assert copy["split"] == "excluded", (row["isic_id"], changes[i % 3])
        assert copy["reason"] == f"same photograph as {row['isic_id']} of {row['split']}"
    assert manifest.duplicates["num_pairs"] == len(shown)
    assert verify(tmp_path / "clean") == []
    kept = prepare(tmp_path / "kept", [*sources, planted], Preparation(size=32, keep_duplicates=True))
    assert kept.splits["train"]["num_images"] == manifest.splits["train"]["num_images"] + len(shown)
    assert kept.duplicates["num_pairs"] == len(shown), "they are reported all the same"


def test_damaged_images_are_named_and_too_many_stop_it(sources, tmp_path):
    for name in ("a03.jpg", "a10.jpg"):
        path = tmp_path / "first" / name
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(
        DataError,
        match=r"2 of 70 images are unreadable, more than the allowed share of 0.01, for example a03: ",
    ):
        prepare(tmp_path / "out", sources, SMALL)
    some = Preparation(size=32, rows_per_shard=10, max_corrupt_share=0.05)
    manifest = prepare(tmp_path / "other", sources, some)
    assert sorted(manifest.unreadable) == ["a03", "a10"]
    assert manifest.splits["excluded"]["num_images"] == 2
    assert str(tmp_path) not in json.dumps(manifest.unreadable)


def test_only_images_under_a_licence(sources, tmp_path):
    manifest = prepare(tmp_path / "out", sources, Preparation(size=32, licenses=("cc0",)))
    rows = read_images(tmp_path / "out")
    assert {row["license"] for row in rows} == {"CC-0"}
    assert len(rows) == 30
    assert manifest.splits["train"]["attributions"] == ["Clinic 0"]
    with pytest.raises(DataError, match="no image is left to prepare: check the sources and the licences"):
        prepare(tmp_path / "none", sources[:1], Preparation(size=32, licenses=("CC-BY-NC",)))


# --- more images later ---------------------------------------------------------------------------------------------


def test_extending_moves_nothing_and_excludes_what_disagrees(prepared, tmp_path):
    before, old = digests(prepared), {row["isic_id"]: row for row in read_images(prepared)}
    by_split = {}
    for row in old.values():
        by_split.setdefault(row["split"], []).append(row)
    train, validation = by_split["train"][0], by_split["validation"][0]
    number = int(train["isic_id"][1:])
    extra = [
        ("n0.jpg", 200, None, train["lesion_id"], "P0", "nv", "CC-0", "New"),
        ("n1.jpg", 201, None, validation["lesion_id"], "P1", "nv", "CC-0", "New"),
        ("n2.jpg", 202, None, validation["lesion_id"], "P0", "nv", "CC-0", "New"),
        (f"{train['isic_id']}.jpg", 203, None, "X", "", "nv", "CC-0", "New"),
    ]
    stolen = [("v0.jpg", number, "flipped", "Y", "", "nv", "CC-0", "New")]
    uris = [
        (None, write_folder(tmp_path / "extra", extra)),
        ("validation", write_folder(tmp_path / "stolen", stolen)),
    ]
    with pytest.raises(DataError, match="choose another, or --extend it"):
        prepare(prepared, uris, SMALL)
    prepare(prepared, uris, SMALL, extend=True)
    rows = read_images(prepared)
    assert {r["isic_id"]: r for r in rows[:70]} == old, "old rows are what they were, place included"
    after = digests(prepared)
    assert all(after[name] == before[name] for name in before if name not in (MANIFEST, IMAGES))
    new = {row["isic_id"]: row for row in rows[70:]}
    assert {name: row["split"] for name, row in new.items()} == {
        "n0": "excluded",
        "n1": "excluded",
        "n2": "excluded",
        train["isic_id"]: "excluded",
        "v0": "excluded",
    }
    assert new["n2"]["reason"].startswith("joins ")
    assert new[train["isic_id"]]["reason"] == "has the isic_id of an image that is there already"
    assert new["v0"]["reason"] == f"same photograph as {train['isic_id']} of train, which stays"
    assert verify(prepared) == []
    again = digests(prepared)
    prepare(prepared, uris, SMALL, extend=True)
    assert digests(prepared) == again


def test_new_lesions_join_the_splits(prepared, tmp_path):
    extra = [(f"m{i}.jpg", 300 + i, None, f"M{i}", "", "nv", "CC-0", "New") for i in range(30)]
    prepare(prepared, [(None, write_folder(tmp_path / "extra", extra))], SMALL, extend=True)
    splits = {row["split"] for row in read_images(prepared)[70:]}
    assert splits == {"train", "validation"}
    assert verify(prepared) == []


def test_an_unfinished_or_other_folder_cannot_be_extended(prepared, sources, tmp_path):
    with pytest.raises(DataError, match="none is not finished: prepare it without --extend"):
        prepare(tmp_path / "none", sources, SMALL, extend=True)
    with pytest.raises(
        DataError, match="was prepared with size = 32, and this is 48: extend it with the same"
    ):
        prepare(prepared, sources[:1], Preparation(size=48), extend=True)


# --- reading it back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_format", ["parquet", "webdataset"])
def test_a_prepared_split_is_a_source(shard_format, sources, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(out, sources, Preparation(size=32, rows_per_shard=10, format=shard_format))
    source = find_source(f"prepared:{out}:train")
    assert find_source(f"{out}:train") == source, "a path will do"
    for holds in (
        assert_processes_share_the_rows,
        assert_pickled_source_reads_the_same,
        assert_metadata_are_the_rows_without_images,
        assert_stream_equals_the_data_set,
        assert_stream_resumes_exactly,
    ):
        holds(source)
    assert source.shard_sizes == [s.rows for s in manifest.shards if s.split == "train"]
    info = source.describe()
    about = manifest.splits["train"]
    assert (info.num_images, info.ids_sha256) == (about["num_images"], about["ids_sha256"])
    assert info.licenses == about["licenses"]
    assert info.manifest_sha256 == hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    assert info.name == "prepared:out:train"
    assert len(rows_of(source.stream())) == about["num_images"]
    assert verify(out) == []


def test_what_cannot_be_read_back(prepared):
    with pytest.raises(
        DataError, match="names no split: expected prepared:DIR:SPLIT with train or validation or test"
    ):
        find_source(f"prepared:{prepared}")
    with pytest.raises(DataError, match="none has no manifest.json"):
        find_source(f"prepared:{prepared.parent}/none")
    shard = next(prepared.glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{shard.name} is missing or truncated: isic-vq data prepare"):
        find_source(f"prepared:{prepared}:train")
    assert verify(prepared) == [
        f"{shard.name} has changed since it was written",
        *verify(prepared)[1:],
    ]
    (prepared / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match=r"manifest.json is damaged .*: prepare it again"):
        Manifest.read(prepared)


def test_verify_finds_what_is_wrong(prepared):
    path = prepared / IMAGES
    rows = read_images(prepared)
    lesion = next(row["lesion_id"] for row in rows if row["split"] == "validation")
    changed = next(row for row in rows if row["split"] == "train")
    changed |= {"lesion_id": lesion, "attribution": None, "license": "CC-BY", "isic_id": rows[-1]["isic_id"]}
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.parquet.read_schema(path))
    pyarrow.parquet.write_table(table, path)
    found = "\n".join(verify(prepared))
    for part in (
        f"lesion_id {lesion} is in train and validation",
        f"{rows[-1]['isic_id']} occurs 2 times",
        "manifest.json and images.parquet count the images of train differently",
        "is under CC-BY and has no attribution",
        "; images.parquet lists ",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8}, "size is 8: expected at least 16 pixels"),
        ({"encoding": "gif"}, "encoding is 'gif': expected jpeg or png"),
        ({"quality": 0}, "quality is 0: expected 1 to 100"),
        ({"format": "zip"}, "format is 'zip': expected parquet or webdataset"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0: expected at least 1"),
        ({"licenses": ("MIT",)}, "images are under 'MIT': expected CC-0, CC-BY or CC-BY-NC"),
    ],
)
def test_settings_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**changes)


def test_png_keeps_every_pixel(sources, tmp_path):
    prepare(tmp_path / "out", sources[:1], Preparation(size=96, encoding="png", max_corrupt_share=0))
    record = find_source(f"prepared:{tmp_path / 'out'}:train").dataset()[0]
    original = Image.open(tmp_path / "first" / f"{record['isic_id']}.jpg")
    assert record["image"].tobytes() == original.convert("RGB").tobytes()
